// The top of the page: where the time went, the headline figures, and what to know before believing them.

const GOAL = 1.1;

function drawSummary(page, run) {
  const figures = run.summary;
  document.getElementById("title").textContent = page.title;
  drawShares(document.getElementById("shares"), figures);
  const other = page.runs[1];
  document.getElementById("figures").append(...tiles(run, other));
  const notes = document.getElementById("notes");
  for (const text of run.notes) notes.append(element("p", { className: "note", text }));
  for (const text of other?.notes ?? []) notes.append(element("p", { className: "note", text: `Other run: ${text}` }));
  const list = document.querySelector("#about dl");
  for (const [name, value] of aboutRows(run)) list.append(element("dt", { text: name }), element("dd", { text: value }));
}

function aboutRows(run) {
  const { summary } = run;
  return [
    ...run.about,
    ["records", `${formatCount(summary.recorded)}, ${formatCount(summary.dropped)} lost`],
    ["cost of recording", summary.overhead === null ? "unknown" : `${formatShare(summary.overhead)} of the time`],
    ["bound", summary.binds ? `${LINK_NAMES[summary.binds] ?? summary.binds}: ${formatTime(summary.bound_ns)} of ${formatTime(summary.window_length_ns)}` : "unknown"],
    ...summary.leaks.map((leak) => ["leak", `${leak.tier.toLowerCase()}: ${formatBytes(leak.nbytes_per_step)} per step over ${leak.steps} steps${leak.module ? `, most in ${leak.module}` : ""}`]),
  ];
}

function drawShares(host, figures) {
  const whole = figures.window_length_ns;
  if (!(whole > 0)) return;
  const parts = [["computing", "computing", figures.compute_ns], ...Object.entries(IDLE).map(([name, label]) => [`idle-${name}`, label, figures.idle[name]])];
  const shown = parts.filter(([, , ns]) => ns > 0);
  const bar = element("div", { className: "shares", role: "img", "aria-label": `Where the time went: ${shown.map(([, label, ns]) => `${label} ${formatShare(ns / whole)}`).join(", ")}` });
  for (const [name, label, ns] of shown) {
    const part = element("span", { style: { background: `var(--${name})`, flex: `${ns / whole} 1 0` } });
    part.addEventListener("pointermove", (event) => tip.show({ title: label, rows: [["time", formatTime(ns)], ["share", formatShare(ns / whole)]] }, event.clientX, event.clientY));
    part.addEventListener("pointerleave", () => tip.hide());
    bar.append(part);
  }
  const keys = element("div", { className: "legend", style: { "margin-top": "10px" } });
  legend(keys, shown.map(([name, label, ns]) => [name, `${label} ${formatShare(ns / whole)}`]));
  host.append(bar, keys);
}

/** One headline figure: {name, value, unit, note, share (of a limit)}. */
function tile({ name, value, unit = "", note = "", share = null }) {
  const made = element("div", {}, element("div", { className: "tile-name", text: name }));
  made.append(element("div", { className: "tile-value", text: value }, element("small", { text: unit })));
  if (share !== null) {
    const meter = element("div", { className: "tile-meter" });
    meter.append(element("span", { style: { width: `${Math.min(100, share * 100)}%`, background: share > 1 ? "var(--bad)" : "var(--accent)" } }));
    made.append(meter);
  }
  made.append(element("div", { className: "tile-note", text: note }));
  return made;
}

function split(text) {
  const cut = text.lastIndexOf(" ");
  return cut < 0 ? [text, ""] : [text.slice(0, cut), text.slice(cut + 1)];
}

function tiles(run, other) {
  const figures = run.summary;
  const was = other?.summary;
  const against = (value) => (was ? `other run ${value}` : "");
  const known = (value, format) => (value === null || value === undefined ? "–" : format(value));
  const distance = (value) => known(value, (x) => x.toFixed(2));
  const rate = (value) => known(value, digits);
  const [step, stepUnit] = split(formatTime(figures.step_ns));
  const [bubble, percent] = split(formatShare(figures.bubble));
  const onTime = (one) => one.prefetch.streamed_on_time ?? one.prefetch.on_time;
  const [time, timeUnit] = split(formatShare(onTime(figures)));
  const found = [
    { name: "Distance", value: distance(figures.distance), unit: figures.distance === null ? "" : "×", note: against(`${distance(was?.distance)} ×`) || (figures.distance === null ? "no bound is known" : `goal ${GOAL.toFixed(2)} ×`) },
    { name: "Bubble", value: bubble, unit: percent, note: against(formatShare(was?.bubble)) || "of the time idle" },
    figures.tokens_per_s !== null
      ? { name: "Tokens per second", value: rate(figures.tokens_per_s), note: against(rate(was?.tokens_per_s)) || plural(figures.tokens, "token") }
      : null,
    { name: "Median step", value: step, unit: stepUnit, note: against(formatTime(was?.step_ns)) || plural(figures.steps, "step") },
    ...run.peaks.map((peak) => peakTile(peak, other)),
    figures.prefetch.uses
      ? { name: "Blocks on time", value: time, unit: timeUnit, note: against(formatShare(onTime(was ?? figures))) || `waited ${formatTime(figures.prefetch.waited_ns)}` }
      : null,
    delayTile("Queued kernels", figures.tklqt_ns, was?.tklqt_ns, figures.tklqt_launches ? `launch to start, ${plural(figures.tklqt_launches, "launch", "launches")} of ${figures.tklqt_steps ? plural(figures.tklqt_steps, "step") : "a part of a step"} (TKLQT)` : ""),
    delayTile("Device behind", figures.behind_ns, was?.behind_ns, "call to start on the device, median"),
  ];
  return found.filter(Boolean).map(tile);
}

/** How long work waits for a device; null for a run that does not know. */
function delayTile(name, ns, before, note) {
  if (ns === null || ns === undefined) return null;
  const [value, unit] = split(formatTime(ns));
  return { name, value, unit, note: before === null || before === undefined ? note : `other run ${formatTime(before)}` };
}

const baselineOf = (categories) => categories.find(([name]) => name === "BASELINE")?.[1] ?? 0;

function peakTile(peak, other) {
  const [value, unit] = split(formatBytes(peak.nbytes));
  const limit = peak.budget_nbytes ?? peak.capacity_nbytes;
  const before = other?.peaks.find((one) => one.tier === peak.tier);
  // A budget bounds what penstock takes: what the process held before the run is not part of it.
  const held = peak.nbytes - (peak.budget_nbytes === null ? 0 : baselineOf(peak.categories));
  const part = held < peak.nbytes ? `${formatBytes(Math.max(0, held))} ` : "";
  const of = limit ? `${part}of ${formatBytes(limit)} ${peak.budget_nbytes === null ? "there is" : "budget"}` : "";
  return {
    name: `Peak ${peak.tier.toLowerCase()}`,
    value,
    unit,
    note: before ? `other run ${formatBytes(before.nbytes)}` : of,
    share: limit ? Math.max(0, held) / limit : null,
  };
}

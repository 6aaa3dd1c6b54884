// View 9: what changed between two runs. Deltas are this run (A) less the other one (B): negative is less.

const DIFF_ROWS = 80;

function drawDiff(page, run) {
  const other = page.runs[1];
  if (!other) return;
  const { root, figure } = section("diff");
  root.hidden = false;
  figure.append(figureTable(run, other), element("p", { className: "panel-name" }, element("b", { text: "By module, largest change first" })));
  const rows = moduleDeltas(run, other);
  if (!rows.length) return empty(figure, "No module differs.");
  figure.append(deltaTable(rows));
  if (rows.length > DIFF_ROWS) aside(figure, `${formatCount(rows.length - DIFF_ROWS)} modules with smaller changes are left out.`);
}

/** [name, of A, of B, format, whether less is better], of both runs. */
function comparedFigures(run, other) {
  const [a, b] = [run.summary, other.summary];
  const per = (one, ns) => ns / Math.max(1, one.steps);
  const peaks = run.peaks.flatMap((peak) => {
    const before = other.peaks.find((one) => one.tier === peak.tier);
    return before ? [[`peak ${peak.tier.toLowerCase()}`, peak.nbytes, before.nbytes, formatBytes, true]] : [];
  });
  return [
    ["distance to the bound", a.distance, b.distance, (x) => `${x.toFixed(2)} ×`, true],
    ["median step", a.step_ns, b.step_ns, formatTime, true],
    ["tokens per second", a.tokens_per_s, b.tokens_per_s, digits, false],
    ["bubble", a.bubble, b.bubble, formatShare, true],
    ...Object.entries(IDLE).map(([name, label]) => [`idle per step: ${label}`, per(a, a.idle[name]), per(b, b.idle[name]), formatTime, true]),
    ["blocks on time", a.prefetch.streamed_on_time, b.prefetch.streamed_on_time, formatShare, false],
    ...peaks,
  ].filter(([, x, y]) => x !== null && y !== null && (x || y));
}

function figureTable(run, other) {
  const body = element("tbody");
  for (const [name, a, b, format, lessIsBetter] of comparedFigures(run, other)) {
    const change = b ? a / b - 1 : null;
    const same = change !== null && Math.abs(change) < 0.005;
    const better = a < b === lessIsBetter;
    const text = change === null ? "new" : same ? "same" : `${change > 0 ? "+" : "−"}${formatShare(Math.abs(change))}`;
    body.append(element("tr", {},
      element("td", { text: name }), element("td", { className: "number", text: format(a) }),
      element("td", { className: "number", text: format(b) }),
      element("td", { className: `number ${same ? "" : better ? "better" : "worse"}`, text }),
    ));
  }
  const head = element("tr", {}, ...["", "this run (A)", "other run (B)", "A against B"].map((text, i) => element("th", { className: i ? "number" : "", text, scope: "col", style: i ? { "text-align": "right" } : {} })));
  return element("div", { className: "table-box" }, element("table", {}, element("thead", {}, head), body));
}

/** Modules of either run with what changed per step, those whose waiting and work changed most first. */
function moduleDeltas(run, other) {
  const table = (one) => new Map(one.uses.map((use) => [use.path, use]));
  const [a, b] = [table(run), table(other)];
  const per = (one, use, name) => (use ? use[name] / Math.max(1, one.summary.steps) : 0);
  const rows = [...new Set([...a.keys(), ...b.keys()])].map((path) => {
    const [mine, theirs] = [a.get(path), b.get(path)];
    return {
      path,
      kind: (mine ?? theirs).kind,
      only: !theirs ? "only in A" : !mine ? "only in B" : "",
      waited: per(run, mine, "waited") - per(other, theirs, "waited"),
      self: per(run, mine, "self") - per(other, theirs, "self"),
      peak: (mine ? sumOf(mine.peak) : 0) - (theirs ? sumOf(theirs.peak) : 0),
    };
  });
  const size = (row) => Math.max(Math.abs(row.waited), Math.abs(row.self));
  return rows.filter((row) => row.waited || row.self || row.peak).sort((x, y) => size(y) - size(x) || Math.abs(y.peak) - Math.abs(x.peak));
}

function deltaTable(rows) {
  const columns = [["waited per step", "waited", formatTime], ["self time per step", "self", formatTime], ["peak", "peak", formatBytes]];
  const most = Object.fromEntries(columns.map(([, key]) => [key, Math.max(1, ...rows.map((row) => Math.abs(row[key])))]));
  const body = element("tbody", {}, ...rows.slice(0, DIFF_ROWS).map((row) => {
    const name = element("td", { className: "path", title: row.path }, row.path, element("small", { text: [row.kind, row.only].filter(Boolean).join(", ") }));
    return element("tr", {}, name, ...columns.map(([, key, format]) => element("td", {}, signedMeasure(row[key], most[key], format))));
  }));
  const head = element("tr", {}, element("th", { text: "module", scope: "col" }), ...columns.map(([name]) => element("th", { text: name, scope: "col" })));
  return element("div", { className: "table-box" }, element("table", {}, element("thead", {}, head), body));
}

function signedMeasure(value, most, format) {
  const share = (Math.abs(value) / most) * 50;
  const bar = element("span", { style: { height: "9px", width: `${share}%`, left: value < 0 ? `${50 - share}%` : "50%", background: value < 0 ? "var(--good)" : "var(--bad)" } });
  const text = value ? `${value > 0 ? "+" : ""}${format(value)}` : "–";
  return element("div", { className: "measure signed" }, element("span", { className: "value", text }), element("span", { className: "track" }, bar));
}

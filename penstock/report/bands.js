// View 1: what each tier held over time.

const CATEGORY_ORDER = ["BASELINE", "LIBRARY", "ARENA", "WEIGHT", "BUFFER", "KV", "OPTIMIZER", "GRADIENT", "ACTIVATION"];
const CATEGORY_NAMES = { BASELINE: "before the run", LIBRARY: "imports", ARENA: "arenas", WEIGHT: "weights", BUFFER: "buffers", KV: "KV cache", OPTIMIZER: "optimizer", GRADIENT: "gradients", ACTIVATION: "activations" };
const METER_NAMES = {
  HOST_RSS: "resident", HOST_ANONYMOUS: "anonymous", HOST_CGROUP: "cgroup",
  DEVICE_ALLOCATED: "allocated", DEVICE_RESERVED: "reserved", DEVICE_USED: "in use by all",
};
const METER_DASHES = { HOST_RSS: [], HOST_ANONYMOUS: [2, 3], HOST_CGROUP: [7, 4], DEVICE_ALLOCATED: [], DEVICE_RESERVED: [2, 3], DEVICE_USED: [7, 4] };
const WITHIN_REACH = 2.2; // a limit so many times above what was used still shares its scale

const categoryColour = (name) => name.toLowerCase();
const categoryName = (name) => CATEGORY_NAMES[name] ?? name;

function drawBands(page, run, range) {
  const { legend: keys, figure } = section("memory");
  const other = page.runs[1];
  const present = new Set();
  let meters = false;
  for (const panel of run.bands) {
    const drawn = panel.stack || panel.meters.length;
    const note = drawn ? panelNote(panel) : nothingHeld(panel);
    figure.append(element("p", { className: "panel-name" }, element("b", { text: panel.tier.toLowerCase() }), note));
    if (!drawn) continue;
    for (const [name] of panel.stack?.categories ?? []) present.add(name);
    meters ||= panel.meters.length > 0;
    bandPlot(figure, panel, other?.bands.find((one) => one.tier === panel.tier), run, other, range);
  }
  const shown = CATEGORY_ORDER.filter((name) => present.has(name)).reverse();
  legend(keys, [
    ...shown.map((name) => [categoryColour(name), categoryName(name)]),
    ...(meters ? [["ink", "what the system says", "line"]] : []),
    ...(other ? [["accent", "other run in all", "dash"]] : []),
  ]);
}

function panelNote(panel) {
  const parts = [];
  if (panel.budget) parts.push(`budget ${formatBytes(panel.budget)}`);
  if (panel.capacity) parts.push(`capacity ${formatBytes(panel.capacity)}`);
  if (panel.home) parts.push(`blocks that live here ${formatBytes(panel.home)}`);
  if (panel.stack?.thinned) parts.push(`${formatCount(panel.stack.thinned)} of ${formatCount(panel.records)} changes left out of the drawing, no peak among them`);
  return parts.join(" · ");
}

function nothingHeld(panel) {
  if (panel.home) return `nothing was taken here while this was recorded; ${formatBytes(panel.home)} of blocks live here`;
  return "nothing was recorded here";
}

/** Cumulative levels from the bottom up: [[name, values, sums], …]. */
function stacked(stack) {
  const found = [];
  let below = null;
  const place = (name) => (CATEGORY_ORDER.indexOf(name) + 1 || CATEGORY_ORDER.length + 1);
  for (const [name, values] of [...(stack?.categories ?? [])].sort(([a], [b]) => place(a) - place(b))) {
    const sums = Float64Array.from(values, (value, i) => value + (below ? below[i] : 0));
    found.push([name, values, sums]);
    below = sums;
  }
  return found;
}

function bandPlot(host, panel, other, run, otherRun, range) {
  const layers = stacked(panel.stack);
  const before = stacked(other?.stack);
  const use = Math.max(1, panel.stack?.peak ?? 0, other?.stack?.peak ?? 0, ...panel.meters.map((meter) => meter.peak));
  const limits = limitsOf(panel).filter(([, nbytes]) => nbytes <= use * WITHIN_REACH);
  const top = Math.max(use, ...limits.map(([, nbytes]) => nbytes)) * 1.06;
  const step = niceByteStep(top, 4);
  const plot = new TimePlot(host, range, {
    label: `Bytes in the ${panel.tier.toLowerCase()} tier over time, at most ${formatBytes(use)}`,
    height: (width) => (width < NARROW ? 150 : 178),
    draw(ctx, box) {
      const y = (nbytes) => box.y + box.h - (nbytes / top) * box.h;
      range.draw(ctx, box);
      drawValueAxis(ctx, box, ticksBetween(0, top, step), tickLabels(step, top, SIZES), y);
      ctx.save();
      ctx.beginPath();
      ctx.rect(box.x, 0, box.w, box.y + box.h);
      ctx.clip();
      for (const [name, , sums] of [...layers].reverse()) {
        ctx.fillStyle = colour(categoryColour(name));
        stairs(ctx, box, range, panel.stack.at, sums, y, run.clock.ticks, true);
        ctx.fill();
      }
      for (const meter of panel.meters) {
        ctx.strokeStyle = colour("ink");
        ctx.lineWidth = meter === panel.meters[0] ? 1.6 : 1.1;
        ctx.setLineDash(METER_DASHES[meter.meter] ?? []);
        polyline(ctx, box, range, meter.at, meter.value, y);
      }
      if (before.length) {
        ctx.strokeStyle = colour("accent");
        ctx.lineWidth = 1.6;
        ctx.setLineDash([5, 3]);
        const scale = otherRun.clock.tick / run.clock.tick;
        stairs(ctx, box, range, other.stack.at.map((at) => at * scale), before[before.length - 1][2], y, otherRun.clock.ticks * scale, false);
        ctx.stroke();
      }
      ctx.restore();
      for (const [name, nbytes, ink] of limits) drawLimit(ctx, box, y(nbytes), ink, name, { side: "left" });
      nameMeters(ctx, box, range, panel.meters, y);
    },
    find(x, y, box) {
      const time = range.time(x, box);
      return { title: `${panel.tier.toLowerCase()} at ${formatInstant(time * range.tick)}`, rows: bandRows(panel, layers, time) };
    },
  });
  return plot;
}

/** Lines that use must stay below: a budget bounds what penstock takes on top of what the process held before. */
function limitsOf(panel) {
  const before = Math.max(0, ...(panel.stack?.categories ?? []).flatMap(([name, values]) => (name === "BASELINE" ? [values[values.length - 1]] : [])));
  const found = [];
  if (panel.budget) found.push([`${before ? "before the run + " : ""}budget ${formatBytes(panel.budget)}`, before + panel.budget, "bad"]);
  if (panel.capacity) found.push([`capacity ${formatBytes(panel.capacity)}`, panel.capacity, "faint"]);
  return found;
}

function bandRows(panel, layers, time) {
  const rows = [];
  const row = panel.stack ? upperBound(panel.stack.at, time) - 1 : -1;
  for (const [name, values] of [...layers].reverse()) {
    if (row >= 0 && values[row] > 0) rows.push([categoryName(name), formatBytes(values[row]), categoryColour(name)]);
  }
  if (row >= 0 && layers.length > 1) rows.push(["in all", formatBytes(layers[layers.length - 1][2][row])]);
  for (const meter of panel.meters) {
    const at = upperBound(meter.at, time) - 1;
    if (at >= 0) rows.push([METER_NAMES[meter.meter] ?? meter.meter, formatBytes(meter.value[at])]);
  }
  return rows;
}

/** Rows of an ascending array of instants that the range shows, and one on either side. */
function visible(at, range) {
  return [Math.max(0, upperBound(at, range.low) - 1), Math.min(at.length, upperBound(at, range.high) + 1)];
}

/** A path of levels that hold until they change, the last one `until` the end; closed down to zero for areas. */
function stairs(ctx, box, range, at, values, y, until, closed) {
  const [first, last] = visible(at, range);
  ctx.beginPath();
  if (first >= last) return;
  let level = y(values[first]);
  if (closed) ctx.moveTo(range.x(at[first], box), y(0));
  ctx.lineTo(range.x(at[first], box), level);
  for (let i = first + 1; i < last; i += 1) {
    const x = range.x(at[i], box);
    ctx.lineTo(x, level);
    level = y(values[i]);
    ctx.lineTo(x, level);
  }
  const end = Math.max(range.x(last === at.length ? until : at[last - 1], box), range.x(at[last - 1], box));
  ctx.lineTo(end, level);
  if (closed) ctx.lineTo(end, y(0));
}

function polyline(ctx, box, range, at, values, y) {
  const [first, last] = visible(at, range);
  ctx.beginPath();
  for (let i = first; i < last; i += 1) ctx.lineTo(range.x(at[i], box), y(values[i]));
  ctx.stroke();
}

/** Names of lines at their right ends, kept apart. */
function nameMeters(ctx, box, range, meters, y) {
  ctx.textAlign = "right";
  ctx.textBaseline = "bottom";
  let free = Infinity;
  const ends = meters.map((meter) => [meter, Math.max(0, Math.min(meter.at.length, upperBound(meter.at, range.high)) - 1)]);
  for (const [meter, row] of ends.sort(([a, i], [b, j]) => a.value[i] - b.value[j])) {
    const place = Math.max(box.y + 13, Math.min(y(meter.value[row]) - 3, free));
    outlined(ctx, METER_NAMES[meter.meter] ?? meter.meter, box.x + box.w - 6, place, "ink");
    free = place - 13;
  }
}

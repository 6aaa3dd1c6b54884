// View 2: who worked when.

const COMPUTE_ROW = 17;
const TRANSFER_ROW = 13;
const WAIT_ROW = 15;
const STEP_ROW = 16;
const GROUP_GAP = 13;

/** Rows by where they stand: [{kind, name, rows: [spans in it, ascending], height}, …]. */
function laneGroups(run, suffix = "") {
  const { steps, marks, compute, transfers, waits } = run.lanes;
  const groups = [];
  if (steps.start.length) groups.push({ kind: "step", name: `steps${suffix}`, rows: [indices(steps.start.length)], height: STEP_ROW, spans: steps });
  if (marks.start.length) groups.push({ kind: "mark", name: `marks${suffix}`, rows: [indices(marks.start.length)], height: WAIT_ROW, spans: marks });
  if (waits.start.length) groups.push({ kind: "wait", name: `waits${suffix}`, rows: [indices(waits.start.length)], height: WAIT_ROW, spans: waits });
  const lanes = [...new Set(compute.rows.map(([lane]) => lane))];
  const byRow = byRows(compute.row, compute.rows.length);
  for (const lane of lanes) {
    const rows = compute.rows.flatMap(([one], row) => (one === lane ? [byRow[row]] : []));
    groups.push({ kind: "compute", name: lanes.length > 1 ? `compute ${lane}${suffix}` : `compute${suffix}`, rows, height: COMPUTE_ROW, spans: compute });
  }
  for (const { link, number, rows } of transfers.links) {
    const mine = Array.from({ length: rows }, () => []);
    for (let i = 0; i < transfers.link.length; i += 1) if (transfers.link[i] === number) mine[transfers.row[i]].push(i);
    groups.push({ kind: "transfer", name: `${LINK_NAMES[link]}${suffix}`, rows: mine, height: rows > 6 ? 8 : TRANSFER_ROW, spans: transfers });
  }
  return groups;
}

const indices = (count) => Array.from({ length: count }, (_, i) => i);

/** The numbers of things by the row that each stands in. */
function byRows(rowOf, count) {
  const rows = Array.from({ length: count }, () => []);
  for (let i = 0; i < rowOf.length; i += 1) rows[rowOf[i]].push(i);
  return rows;
}

function placeGroups(groups) {
  let y = 4;
  for (const group of groups) {
    group.y = y;
    y += group.rows.length * group.height + GROUP_GAP;
  }
  return y;
}

function spanColour(kind, spans, row) {
  if (kind === "compute") return PHASE_COLOURS[spans.phase[row]] ?? "forward";
  if (kind === "transfer") return CAUSES[spans.cause[row]] ?? "prefetch";
  if (kind === "mark") return SERIOUS_MARKS.has(spans.kind[row]) ? "bad" : "ink";
  return kind === "step" ? "line" : "demand";
}

/** First place in a row of spans from which on one may reach into the range. */
function firstVisible(row, spans, low) {
  let from = 0;
  let to = row.length;
  while (from < to) {
    const middle = (from + to) >> 1;
    if (spans.start[row[middle]] <= low) from = middle + 1;
    else to = middle;
  }
  return Math.max(0, from - 3); // merged spans may reach a little into their successors
}

function drawLanes(page, run, range) {
  const { legend: keys, figure } = section("lanes");
  const { compute, transfers, waits } = run.lanes;
  const groups = laneGroups(run);
  if (page.runs[1]) groups.push(...laneGroups(page.runs[1], " (B)").map((group) => ({ ...group, other: page.runs[1] })));
  if (!groups.length) return empty(figure, "No module computed and no block moved while this was recorded.");
  const height = placeGroups(groups) + 22;
  const plot = new TimePlot(figure, range, {
    label: `Lanes: ${groups.map((group) => group.name).join(", ")}`,
    height,
    bottom: 24,
    draw: (ctx, box) => paintLanes(ctx, box, range, groups, run),
    find: (x, y, box) => findSpan(groups, run, range, x, y, box),
    keys: { w: () => nextWait(run, range, 1), W: () => nextWait(run, range, -1) },
  });
  selection.listeners.push(() => plot.redraw());
  legend(keys, laneKeys(run));
  if (!transfers.start.length) aside(figure, "No block was moved between tiers: this is what the modules themselves did.");
  laneAsides(figure, run);
  return plot;
}

function laneKeys(run) {
  const { compute, transfers, waits } = run.lanes;
  const phases = new Set(compute.phase);
  const causes = new Set(transfers.cause);
  return [
    ...PHASES.flatMap((name, i) => (phases.has(i) ? [[PHASE_COLOURS[i], name]] : [])),
    ...CAUSES.flatMap((name, i) => (causes.has(i) ? [[name, `moved: ${name}`]] : [])),
    ...(waits.start.length ? [["demand", "waits", "hatch"]] : []),
  ];
}

function laneAsides(figure, run) {
  const parts = [];
  for (const [name, spans] of [["spans of compute", run.lanes.compute], ["transfers", run.lanes.transfers], ["waits", run.lanes.waits]]) {
    if (spans.merged_ns) parts.push(`${formatCount(spans.shown)} ${name} as ${formatCount(spans.start.length)}, those shorter than ${formatTime(spans.merged_ns)} merged with their neighbours`);
  }
  if (parts.length) aside(figure, `Too many to draw one by one: ${parts.join("; ")}. Paler spans are partly idle.${run.focus.length && run.lanes.compute.exact.length ? " The stretches behind the buttons above are exact." : ""}`);
  if (run.lanes.compute.hidden) aside(figure, `${plural(run.lanes.compute.hidden, "span")} of deeply nested modules and of minor threads are not drawn.`);
}

function paintLanes(ctx, box, range, groups, run) {
  range.draw(ctx, box);
  const hatch = hatching(ctx);
  for (const group of groups) {
    nameGroup(ctx, box, group);
    if (group.kind === "compute" && !group.other) shadeWaits(ctx, box, range, run.lanes.waits, group, hatch);
    ctx.save();
    ctx.beginPath();
    ctx.rect(box.x, group.y - 1, box.w, group.rows.length * group.height + 2);
    ctx.clip();
    group.rows.forEach((row, i) => paintRow(ctx, box, range, group, row, group.y + i * group.height, hatch));
    ctx.restore();
  }
}

function nameGroup(ctx, box, group) {
  const middle = group.y + (group.rows.length * group.height) / 2;
  ctx.fillStyle = colour("soft");
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  const words = group.name.split(" → ");
  const lines = words.length > 1 && ctx.measureText(group.name).width > box.x - 10 ? [words[0], `→ ${words[1]}`] : [group.name];
  lines.forEach((line, i) => ctx.fillText(line, box.x - 8, middle + (i - (lines.length - 1) / 2) * 13));
  ctx.fillStyle = colour("grid");
  ctx.fillRect(box.x, group.y + group.rows.length * group.height + GROUP_GAP / 2, box.w, 1);
}

/** Diagonal lines: a module that needed a block and did not have it. */
function hatching(ctx) {
  const ratio = Math.min(3, devicePixelRatio || 1);
  const size = Math.round(6 * ratio);
  const tile = element("canvas", { width: size, height: size });
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour("demand");
  pen.lineWidth = 1.4 * ratio;
  for (const shift of [-size, 0, size]) {
    pen.beginPath();
    pen.moveTo(shift - 1, size + 1);
    pen.lineTo(shift + size + 1, -1);
    pen.stroke();
  }
  const pattern = ctx.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / ratio));
  return pattern;
}

function shadeWaits(ctx, box, range, waits, group, hatch) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(box.x, group.y, box.w, group.rows.length * group.height);
  ctx.clip();
  ctx.globalAlpha = selection.inside ? 0.07 : 0.22;
  ctx.fillStyle = hatch;
  eachSpan(indicesOf(waits), waits, range, box, (row, x, w) => {
    if (w >= 2) ctx.fillRect(x, group.y, w, group.rows.length * group.height);
  });
  ctx.restore();
}

const rowsOf = new WeakMap();
function indicesOf(spans) {
  if (!rowsOf.has(spans)) rowsOf.set(spans, indices(spans.start.length));
  return rowsOf.get(spans);
}

/** Call `paint(row, x, width)` for the spans of a row that the range shows; those within one pixel are drawn once. */
function eachSpan(row, spans, range, box, paint, scale = 1) {
  let drawn = -Infinity;
  for (let i = firstVisible(row, spans, range.low / scale); i < row.length; i += 1) {
    const span = row[i];
    const x = range.x(spans.start[span] * scale, box);
    if (x > box.x + box.w) break;
    const end = range.x((spans.start[span] + spans.length[span]) * scale, box);
    if (end < box.x || end < drawn + 0.4) continue;
    paint(span, Math.max(x, box.x - 2), Math.max(0.8, Math.min(end, box.x + box.w + 2) - Math.max(x, box.x - 2)));
    drawn = end;
  }
}

function paintRow(ctx, box, range, group, row, y, hatch) {
  const { spans, kind } = group;
  const height = group.height - 2;
  const run = group.other ?? selection.run;
  const scale = group.other ? group.other.clock.tick / range.tick : 1;
  eachSpan(row, spans, range, box, (span, x, w) => {
    const faint = !group.other && spans.module !== undefined && selection.fades(spans.module[span]);
    const name = spanColour(kind, spans, span);
    ctx.globalAlpha = (faint ? 0.13 : 1) * (group.other ? 0.62 : 1) * (0.3 + 0.7 * (spans.fill[span] / 255));
    ctx.fillStyle = colour(name);
    const inner = w > 3 ? w - 0.7 : w;
    if (kind === "mark") {
      markerPath(ctx, "H2D", x, y + height / 2, 3.6);
      ctx.fill();
      return;
    }
    if (kind === "wait" && w > 3) {
      ctx.globalAlpha *= 0.16;
      ctx.fillRect(x, y, inner, height);
      ctx.globalAlpha = faint ? 0.2 : 0.95;
      ctx.fillStyle = hatch;
    }
    ctx.fillRect(x, y, inner, height);
    if (spans.failed?.[span]) {
      ctx.fillStyle = colour("ink");
      ctx.fillRect(x, y + height - 2, inner, 2);
    }
    const chosen = !group.other && selection.span?.kind === kind && selection.span.row === span;
    if (chosen) {
      ctx.globalAlpha = 1;
      ctx.strokeStyle = colour("ink");
      ctx.lineWidth = 2;
      ctx.strokeRect(x + 1, y, Math.max(1, inner - 2), height);
    }
    if (w > 34 && height >= 11 && kind !== "wait" && spans.count[span] === 1) {
      ctx.globalAlpha = faint ? 0.3 : 1;
      ctx.fillStyle = colour(kind === "step" ? "soft" : "on-span");
      ctx.textAlign = "left";
      ctx.textBaseline = "middle";
      ctx.save();
      ctx.font = FONT.replace("12px", height < 13 ? "10px" : "11px");
      const text = kind === "step" ? stepName(spans, span) : kind === "compute" ? run.moduleName(spans.module[span]) : run.blockName(spans.block[span]);
      ctx.fillText(fitted(ctx, text, inner - 8), x + 4, y + height / 2 + 0.5);
      ctx.restore();
    }
    ctx.globalAlpha = 1;
  }, scale);
}

/** The span under a point: its description, and how to choose it. */
function findSpan(groups, run, range, x, y, box) {
  const group = groups.find((one) => y >= one.y && y < one.y + one.rows.length * one.height);
  if (!group) return null;
  const row = group.rows[Math.floor((y - group.y) / group.height)];
  const scale = group.other ? group.other.clock.tick / range.tick : 1;
  const time = range.time(x, box) / scale;
  const slack = (2.5 / box.w) * range.length;
  let best = null;
  for (let i = firstVisible(row, group.spans, time); i < row.length && group.spans.start[row[i]] <= time + slack; i += 1) {
    const end = group.spans.start[row[i]] + group.spans.length[row[i]];
    if (end >= time - slack) best = row[i];
  }
  if (best === null) return null;
  const found = describeSpan(group.other ?? run, group.kind, best);
  if (group.other || group.kind === "mark") return found;
  const { start, length } = group.spans;
  const pick = group.kind === "step" ? () => range.show(start[best], start[best] + length[best]) : () => selection.chooseSpan(group.kind, best);
  return { ...found, pick };
}

function nextWait(run, range, direction) {
  const { waits } = run.lanes;
  const count = waits.start.length;
  if (!count) return;
  const before = selection.span?.kind === "wait" ? selection.span.row : upperBound(waits.start, (range.low + range.high) / 2) - (direction > 0 ? 1 : 0);
  const row = Math.max(0, Math.min(count - 1, before + direction));
  const middle = waits.start[row] + waits.length[row] / 2;
  if (waits.length[row] > range.length * 0.8) range.show(waits.start[row], waits.start[row] + waits.length[row]);
  else range.pan(middle - (range.low + range.high) / 2);
  selection.chooseSpan("wait", row);
}

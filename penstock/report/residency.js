// View 4: where blocks were.

function drawResidency(page, run, range) {
  const { legend: keys, figure } = section("residency");
  const { residency } = run;
  const rows = residency.blocks.length;
  if (!rows) return empty(figure, "No blocks: nothing was streamed in this run.");
  const byRow = byRows(residency.row, rows);
  const byTier = [1, 0].map((tier) => [tier, byRow.map((row) => row.filter((stay) => residency.tier[stay] === tier))]);
  const present = new Set([...residency.tier, ...run.blocks.map((block) => block.home)]);
  const plot = new TimePlot(figure, range, {
    label: `Where each of ${rows} blocks was over time`,
    height: (width) => Math.min(width < NARROW ? 380 : 520, Math.max(120, rows * 15 + 40)),
    draw: (ctx, box) => paintResidency(ctx, box, range, run, byTier),
    find: (x, y, box) => findStay(run, range, byRow, x, y, box),
  });
  selection.listeners.push(() => plot.redraw());
  legend(keys, TIERS.flatMap((name, tier) => (present.has(tier) ? [[`tier-${name}`, name]] : [])));
  if (residency.merged_ns) aside(figure, `${formatCount(residency.stays)} stays as ${formatCount(residency.start.length)}: those shorter than ${formatTime(residency.merged_ns)} are merged with their neighbours; paler ones were partly elsewhere.`);
  return plot;
}

function paintResidency(ctx, box, range, run, byTier) {
  const { residency, blocks } = run;
  const rows = residency.blocks.length;
  const high = box.h / rows;
  const thick = high > 4 ? high - 1 : high;
  ctx.save();
  ctx.beginPath();
  ctx.rect(box.x, box.y, box.w, box.h);
  ctx.clip();
  const start = range.x(0, box);
  const end = range.x(run.clock.ticks, box);
  for (let i = 0; i < rows; i += 1) {
    const block = blocks[residency.blocks[i]];
    const y = box.y + i * high;
    const faint = selection.fades(block.module) ? 0.2 : 1;
    ctx.globalAlpha = faint;
    ctx.fillStyle = colour(`tier-${TIERS[block.home]}`);
    ctx.fillRect(start, y, end - start, thick);
    for (const [tier, stays] of byTier) {
      ctx.fillStyle = colour(`tier-${TIERS[tier]}`);
      eachSpan(stays[i], residency, range, box, (stay, x, w) => {
        ctx.globalAlpha = faint * (0.25 + 0.75 * (residency.fill[stay] / 255));
        ctx.fillRect(x, y, w, thick);
      });
    }
  }
  ctx.restore();
  ctx.globalAlpha = 1;
  range.draw(ctx, box, { grid: false });
  nameBlocks(ctx, box, run, high);
}

function nameBlocks(ctx, box, run, high) {
  const every = Math.max(1, Math.ceil(15 / high));
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (let i = 0; i < run.residency.blocks.length; i += every) {
    const block = run.blocks[run.residency.blocks[i]];
    ctx.fillStyle = colour(selection.inside && !selection.fades(block.module) ? "ink" : "faint");
    ctx.fillText(fitted(ctx, block.name, box.x - 10), box.x - 8, box.y + (i + 0.5) * high);
  }
}

function findStay(run, range, byRow, x, y, box) {
  const i = Math.floor(((y - box.y) / box.h) * byRow.length);
  if (i < 0 || i >= byRow.length) return null;
  const { residency } = run;
  const number = residency.blocks[i];
  const block = run.blocks[number];
  const time = range.time(x, box);
  const here = byRow[i].filter((stay) => residency.start[stay] <= time && residency.start[stay] + residency.length[stay] >= time);
  const stay = here.sort((a, b) => residency.tier[a] - residency.tier[b])[0];
  const tier = stay === undefined ? block.home : Math.min(block.home, residency.tier[stay]);
  const rows = [["at", formatInstant(time * range.tick)], ["in", TIERS[tier], `tier-${TIERS[tier]}`], ["lives in", TIERS[block.home]], ["size", formatBytes(block.nbytes)]];
  if (stay !== undefined) {
    rows.push(["came at", formatInstant(run.ns(residency.start[stay]))], ["stayed", formatTime(run.ns(residency.length[stay]))]);
    if (residency.count[stay] > 1) rows.push(["stands for", `${formatCount(residency.count[stay])} stays`]);
  }
  if (block.module >= 0) rows.push(["module", run.moduleName(block.module)]);
  return { title: block.name, rows, pick: block.module >= 0 ? () => selection.choose(block.module) : undefined };
}

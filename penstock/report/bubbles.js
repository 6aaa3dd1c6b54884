// View 3: what the processor waited for, step by step.

function drawBubbles(page, run, range) {
  const { legend: keys, figure } = section("bubbles");
  const other = page.runs[1];
  const bars = run.bubbles ?? wholeBubble(run);
  if (!bars) return empty(figure, "No step was recorded, and no time without computing.");
  const shown = bars.causes.filter(([, values]) => values.some((ns) => ns > 0));
  if (!shown.length) return empty(figure, noBubble(run));
  const count = bars.first.length;
  const sums = Float64Array.from(bars.first, (_, i) => bars.causes.reduce((sum, [, values]) => sum + values[i], 0));
  const before = other ? total(other.summary.idle) / Math.max(1, other.summary.steps) : 0;
  const top = Math.max(before, ...sums) * 1.08;
  const plot = new Plot(figure, {
    label: `Time without computing in each of ${bars.steps} steps, by cause`,
    height: 230,
    bottom: 40,
    draw(ctx, box) {
      const y = (ns) => box.y + box.h - (ns / top) * box.h;
      const step = niceStep(top, 5);
      drawValueAxis(ctx, box, ticksBetween(0, top, step), tickLabels(step, top, TIMES), y);
      const wide = box.w / count;
      const gap = wide > 4 ? Math.min(wide * 0.28, 8) : 0;
      const bar = Math.min(wide - gap, 90);
      for (let i = 0; i < count; i += 1) {
        let base = 0;
        for (const [cause, values] of bars.causes) {
          if (!(values[i] > 0)) continue;
          ctx.fillStyle = colour(`idle-${cause}`);
          ctx.fillRect(box.x + (i + 0.5) * wide - bar / 2, y(base + values[i]), bar, y(base) - y(base + values[i]));
          base += values[i];
        }
      }
      if (before) drawLimit(ctx, box, y(before), "accent", `other run, mean ${formatTime(before)}`);
      const every = Math.max(1, niceStep(count, Math.max(2, box.w / 60)));
      const marks = ticksBetween(0, count - 1, every);
      drawAcrossAxis(ctx, box, marks, (i) => formatCount(bars.first[i]), (i) => box.x + (i + 0.5) * wide, { grid: false });
      ctx.textAlign = "right";
      ctx.fillStyle = colour("faint");
      ctx.fillText("step", box.x - 8, box.y + box.h + 8);
    },
    stops: { count, at: (i, box) => [box.x + ((i + 0.5) / count) * box.w, box.y + box.h / 2] },
    find(x, y, box) {
      const i = Math.floor(((x - box.x) / box.w) * count);
      if (i < 0 || i >= count) return null;
      return { title: barName(bars, i), rows: barRows(bars, sums, i), pick: bars.start[i] >= 0 ? () => showStep(bars, range, i) : undefined };
    },
  });
  legend(keys, shown.map(([cause]) => [`idle-${cause}`, IDLE[cause]]));
  if (bars.group > 1) aside(figure, `${formatCount(bars.steps)} steps: each bar is the mean of ${bars.group} neighbours; the tooltip names the longest.`);
  if (bars.whole) aside(figure, "Steps were not told apart: this is the mean over the whole window.");
  return plot;
}

function noBubble(run) {
  const between = total(run.summary.idle);
  return between ? `Within steps modules computed all the time; ${formatTime(between)} passed between steps.` : "Modules computed all the time: there is no bubble.";
}

const total = (idle) => Object.values(idle).reduce((sum, ns) => sum + ns, 0);

/** One bar for runs whose steps are not known. */
function wholeBubble(run) {
  const { idle, steps } = run.summary;
  if (!total(idle)) return null;
  const share = Math.max(1, steps);
  return { group: 1, whole: true, first: [0], last: [0], start: [-1], end: [-1], steps: share, longest: [total(idle) / share], causes: Object.entries(idle).map(([name, ns]) => [name, [ns / share]]) };
}

const barName = (bars, i) => (bars.whole ? "Mean step" : bars.first[i] === bars.last[i] ? `Step ${bars.first[i]}` : `Steps ${bars.first[i]} to ${bars.last[i]}`);

function barRows(bars, sums, i) {
  const rows = bars.causes.filter(([, values]) => values[i] > 0).map(([cause, values]) => [IDLE[cause], formatTime(values[i]), `idle-${cause}`]);
  rows.push([bars.group > 1 ? "mean bubble" : "bubble", formatTime(sums[i])]);
  if (bars.group > 1) rows.push(["longest", formatTime(bars.longest[i])]);
  return rows;
}

function showStep(bars, range, i) {
  range.show(bars.start[i], bars.end[i]);
  document.getElementById("lanes").scrollIntoView();
}

// View 7: how early blocks were there.

function drawLeads(page, run) {
  const { legend: keys, figure } = section("leads");
  const { leads } = run;
  if (!leads) return empty(figure, "No block was brought for a use: there is nothing that could be early or late.");
  const other = page.runs[1]?.leads;
  const shares = (one) => one.counts.map((count) => count / one.uses);
  const mine = shares(leads);
  const theirs = other ? shares(other) : [];
  const low = Math.min(leads.first * leads.width, other ? other.first * other.width : 0);
  const high = Math.max((leads.first + mine.length) * leads.width, other ? (other.first + theirs.length) * other.width : 0);
  const scale = other ? 1 : leads.uses;
  const top = Math.max(...mine, ...theirs) * scale * 1.1;
  const place = (box) => ({
    x: (ns) => box.x + ((ns - low) / (high - low)) * box.w,
    y: (value) => box.y + box.h - (value / top) * box.h,
  });
  const plot = new Plot(figure, {
    label: `Uses of blocks by ready minus needed: ${leads.late} of ${leads.uses} were late`,
    height: 230,
    top: 26,
    bottom: 30,
    draw(ctx, box) {
      const { x, y } = place(box);
      const step = other ? niceStep(top, 4) : Math.max(1, niceStep(top, 4));
      drawValueAxis(ctx, box, ticksBetween(0, top, step), other ? formatShare : formatCount, y);
      const width = niceStep(high - low, Math.max(2, box.w / 100));
      drawAcrossAxis(ctx, box, ticksBetween(low, high, width), tickLabels(width, Math.max(-low, high), TIMES), x);
      mine.forEach((share, i) => {
        if (!share) return;
        const from = (leads.first + i) * leads.width;
        ctx.fillStyle = colour(from >= 0 ? "demand" : "prefetch");
        const left = x(from) + 0.5;
        ctx.fillRect(left, y(share * scale), Math.max(1, x(from + leads.width) - left - 0.5), y(0) - y(share * scale));
      });
      if (other) outlineBars(ctx, theirs, other, x, y);
      zeroLine(ctx, box, x(0));
    },
    stops: { count: mine.length, at: (i, box) => [place(box).x((leads.first + i + 0.5) * leads.width), box.y + box.h / 2] },
    find(px, py, box) {
      const ns = low + ((px - box.x) / box.w) * (high - low);
      const i = Math.floor(ns / leads.width) - leads.first;
      return i >= 0 && i < mine.length ? leadTip(leads, i) : null;
    },
  });
  legend(keys, [["prefetch", `in time: ${formatShare(1 - leads.late / leads.uses)}`], ["demand", `late: ${formatShare(leads.late / leads.uses)}`], ...(other ? [["ink", "other run", "line"]] : [])]);
  aside(figure, `${plural(leads.uses, "use")} of blocks that were brought; median ${formatTime(leads.median)}, from ${formatTime(leads.least)} to ${formatTime(leads.most)}.`);
  return plot;
}

function leadTip(leads, i) {
  const from = (leads.first + i) * leads.width;
  const first = i === 0 && leads.least < from;
  const last = i === leads.counts.length - 1 && leads.most > from + leads.width;
  const text = first ? `up to ${formatTime(from + leads.width)}` : last ? `${formatTime(from)} and more` : `${formatTime(from)} to ${formatTime(from + leads.width)}`;
  return { title: text, rows: [["uses", formatCount(leads.counts[i])], ["share", formatShare(leads.counts[i] / leads.uses)], ["these were", from >= 0 ? "late" : "in time"]] };
}

function outlineBars(ctx, shares, other, x, y) {
  ctx.strokeStyle = colour("ink");
  ctx.lineWidth = 1.4;
  ctx.beginPath();
  ctx.moveTo(x(other.first * other.width), y(0));
  shares.forEach((share, i) => {
    ctx.lineTo(x((other.first + i) * other.width), y(share));
    ctx.lineTo(x((other.first + i + 1) * other.width), y(share));
  });
  ctx.lineTo(x((other.first + shares.length) * other.width), y(0));
  ctx.stroke();
}

function zeroLine(ctx, box, x) {
  ctx.fillStyle = colour("ink");
  ctx.fillRect(Math.round(x) - 0.5, box.y - 18, 1, box.h + 18);
  ctx.textBaseline = "top";
  ctx.fillStyle = colour("soft");
  ctx.textAlign = "right";
  if (x - box.x > 70) ctx.fillText("← in time", x - 8, box.y - 20);
  ctx.textAlign = "left";
  if (box.x + box.w - x > 50) ctx.fillText("late →", x + 8, box.y - 20);
}

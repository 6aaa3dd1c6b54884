// View 6: how fast transfers of each size went.

const OUT_OF_SCALE = 2.5; // rates beyond so many times the best peak (page cache, tiny transfers) are drawn at the edge

function drawBandwidth(page, run) {
  const { legend: keys, figure } = section("bandwidth");
  const clouds = run.bandwidth;
  if (!clouds.length) return empty(figure, "Nothing was moved between tiers.");
  const outlines = page.runs[1]?.bandwidth ?? [];
  const all = [...clouds, ...outlines];
  const peaks = clouds.map((cloud) => cloud.peak ?? 0);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), 0); // there may be too many to spread
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const fastest = most(all.map((cloud) => most(cloud.rate)));
  const best = Math.max(...peaks);
  const top = best > 0 ? Math.min(Math.max(best * 1.12, fastest * 1.05), best * OUT_OF_SCALE) : fastest * 1.08;
  const low = Math.log2(least(all.map((cloud) => least(cloud.size)))) - 0.5;
  const high = Math.log2(most(all.map((cloud) => most(cloud.size)))) + 0.5;
  const place = (box) => ({
    x: (size) => box.x + ((Math.log2(size) - low) / (high - low)) * box.w,
    y: (rate) => box.y + box.h - (Math.min(rate, top) / top) * box.h,
  });
  const plot = new Plot(figure, {
    label: `Bandwidth against transfer size of ${clouds.map((cloud) => LINK_NAMES[cloud.link]).join(", ")}`,
    height: (width) => (width < NARROW ? 260 : 320),
    bottom: 30,
    draw(ctx, box) {
      const { x, y } = place(box);
      const step = niceStep(top, 5);
      drawValueAxis(ctx, box, ticksBetween(0, top, step), tickLabels(step, top, RATES), y);
      const each = Math.max(1, Math.ceil((high - low) / Math.max(2, box.w / 90)));
      const ticks = ticksBetween(Math.ceil(low / each) * each, high, each).map((power) => 2 ** power);
      drawAcrossAxis(ctx, box, ticks, formatBytes, x);
      for (const cloud of outlines) paintCloud(ctx, cloud, x, y, false);
      for (const cloud of clouds) paintCloud(ctx, cloud, x, y, true);
      let free = Infinity;
      for (const cloud of clouds.filter((one) => one.peak).sort((a, b) => a.peak - b.peak)) {
        const line = y(cloud.peak);
        const above = clouds.some((one) => one.peak > cloud.peak && line - y(one.peak) < 18);
        drawLimit(ctx, box, line, LINK_COLOURS[cloud.link], `${LINK_NAMES[cloud.link]} ${formatRate(cloud.peak)}`, { below: above && line + 18 < free });
        free = line;
      }
    },
    find(px, py, box) {
      const { x, y } = place(box);
      let found = null;
      let nearest = 14 ** 2;
      for (const cloud of clouds) {
        for (let i = 0; i < cloud.size.length; i += 1) {
          const distance = (x(cloud.size[i]) - px) ** 2 + (y(cloud.rate[i]) - py) ** 2;
          if (distance < nearest) [nearest, found] = [distance, [cloud, i]];
        }
      }
      return found && pointTip(...found);
    },
  });
  legend(keys, [...clouds.map((cloud) => [LINK_COLOURS[cloud.link], `${LINK_NAMES[cloud.link]}, ${plural(cloud.transfers, "transfer")}`]), ...(outlines.length ? [["faint", "hollow: other run"]] : [])]);
  if (fastest > top) aside(figure, `Rates above ${formatRate(top)} (up to ${formatRate(fastest)}) are drawn at the upper edge: bytes that came from a cache.`);
  return plot;
}

function pointTip(cloud, i) {
  const rows = [["size", formatBytes(cloud.size[i])], ["rate", formatRate(cloud.rate[i])]];
  if (cloud.peak) rows.push(["of its peak", formatShare(cloud.rate[i] / cloud.peak)]);
  if (cloud.count[i] > 1) rows.push(["mean of", plural(cloud.count[i], "transfer")]);
  return { title: LINK_NAMES[cloud.link], rows };
}

/** Links differ by shape too: circle, square, upright and inverted triangle. */
function markerPath(ctx, link, x, y, r) {
  ctx.beginPath();
  const shape = LINKS.indexOf(link);
  if (shape === 0) ctx.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === 1) ctx.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
  else {
    const up = shape === 2 ? 1 : -1;
    ctx.moveTo(x, y - r * 1.15 * up);
    ctx.lineTo(x + r * 1.05, y + r * 0.8 * up);
    ctx.lineTo(x - r * 1.05, y + r * 0.8 * up);
    ctx.closePath();
  }
}

function paintCloud(ctx, cloud, x, y, filled) {
  ctx.save();
  ctx.fillStyle = ctx.strokeStyle = colour(LINK_COLOURS[cloud.link]);
  ctx.lineWidth = 1;
  for (let i = 0; i < cloud.size.length; i += 1) {
    markerPath(ctx, cloud.link, x(cloud.size[i]), y(cloud.rate[i]), 2.4 + Math.log2(cloud.count[i]) * 0.55);
    ctx.globalAlpha = filled ? 0.42 : 0.8;
    if (filled) ctx.fill();
    else ctx.stroke();
  }
  ctx.restore();
}

// The stretch of time that all time plots show, and the gestures that change it.

class TimeRange {
  /** `most` is the length of the run in ticks, `tick` the length of one in nanoseconds. */
  constructor(most, tick) {
    this.most = most;
    this.tick = tick;
    this.low = 0;
    this.high = most;
    this.listeners = [];
    this.plots = [];
  }

  get length() {
    return this.high - this.low;
  }

  set(low, high) {
    const least = Math.min(this.most, Math.max(1, 200 / this.tick)); // 200 ns: below that the clock is noise
    const length = Math.min(this.most, Math.max(least, high - low));
    const start = Math.max(0, Math.min(low - Math.max(0, length - (high - low)) / 2, this.most - length));
    this.low = start;
    this.high = start + length;
    for (const listener of this.listeners) listener();
  }

  /** Show `factor` times as much, keeping the instant `at` where it is. */
  zoom(factor, at = (this.low + this.high) / 2) {
    this.set(at - (at - this.low) * factor, at + (this.high - at) * factor);
  }

  pan(ticks) {
    const { length } = this;
    const low = Math.max(0, Math.min(this.low + ticks, this.most - length));
    this.set(low, low + length);
  }

  all() {
    this.set(0, this.most);
  }

  /** Show a stretch with some room around it. */
  show(low, high) {
    const room = Math.max((high - low) * 0.06, 1);
    this.set(low - room, high + room);
  }

  x(ticks, box) {
    return box.x + ((ticks - this.low) / this.length) * box.w;
  }

  time(x, box) {
    return this.low + ((x - box.x) / box.w) * this.length;
  }

  /** Ticks of an axis, in nanoseconds since the first record. */
  draw(ctx, box, options) {
    const extent = this.length * this.tick;
    const step = niceTimeStep(extent, Math.max(2, box.w / 110));
    const label = tickLabels(step, Math.max(extent, 1), TIMES);
    const ticks = ticksBetween(this.low * this.tick, this.high * this.tick, step);
    drawAcrossAxis(ctx, box, ticks, label, (ns) => this.x(ns / this.tick, box), options);
  }

  toString() {
    const whole = this.length >= this.most * 0.9999;
    return whole ? `all of ${formatTime(this.most * this.tick)}` : `${formatTime(this.length * this.tick)} from ${formatInstant(this.low * this.tick)}`;
  }
}

/** A plot whose x axis is the shared range, with all its gestures. */
class TimePlot extends Plot {
  constructor(host, range, options) {
    super(host, { ...options, timed: true });
    this.range = range;
    this.pointers = new Map();
    this.cursor = element("div", { className: "cursor", hidden: "" });
    this.brush = element("div", { className: "brush", hidden: "" });
    this.root.append(this.cursor, this.brush);
    this.canvas.tabIndex = 0;
    range.listeners.push(() => this.redraw());
    range.plots.push(this);
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.drop(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("dblclick", () => range.all());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show the instant under the pointer in all time plots; null for none. */
  point(time) {
    for (const plot of this.range.plots) {
      const { box } = plot;
      plot.cursor.hidden = time === null || time < this.range.low || time > this.range.high;
      plot.cursor.style.left = `${this.range.x(time ?? 0, box)}px`;
      plot.cursor.style.height = `${box.y + box.h}px`;
    }
  }

  wheel(event) {
    const focused = document.activeElement === this.canvas;
    if (!event.ctrlKey && !event.metaKey && !focused) {
      if (Math.abs(event.deltaY) > Math.abs(event.deltaX)) this.hint();
      return;
    }
    event.preventDefault();
    const [x] = this.at(event);
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.range.pan((event.deltaX / this.box.w) * this.range.length);
    else this.range.zoom(Math.exp(Math.max(-80, Math.min(80, event.deltaY)) * 0.005), this.range.time(x, this.box));
    tip.hide();
  }

  /** Say once how to zoom: a plain wheel scrolls the page. */
  hint() {
    if (TimePlot.hinted) return;
    TimePlot.hinted = true;
    const hint = element("div", { className: "hint", text: "Ctrl + wheel zooms, or click the plot first" });
    this.root.append(hint);
    setTimeout(() => hint.remove(), 2200);
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const [x, y] = this.at(event);
    this.pointers.set(event.pointerId, { x, y, from: x, low: this.range.low, high: this.range.high });
    this.pinched ||= this.pointers.size > 1;
    this.canvas.focus({ preventScroll: true });
  }

  move(event) {
    const [x, y] = this.at(event);
    const pointer = this.pointers.get(event.pointerId);
    this.point(event.pointerType === "touch" ? null : this.range.time(x, this.box));
    if (!pointer) return;
    const before = [...this.pointers.values()].map((one) => one.x);
    pointer.x = x;
    pointer.y = y;
    if (this.pointers.size === 2) this.pinch(before, [...this.pointers.values()].map((one) => one.x));
    else if (!this.pinched && Math.abs(x - pointer.from) > 4) this.drag(event, pointer, x);
  }

  pinch(before, after) {
    const spread = ([a, b]) => Math.max(12, Math.abs(a - b));
    const centre = ([a, b]) => (a + b) / 2;
    const at = this.range.time(centre(before), this.box);
    this.range.zoom(spread(before) / spread(after), at);
    this.range.pan(((centre(before) - centre(after)) / this.box.w) * this.range.length);
  }

  drag(event, pointer, x) {
    const { box } = this;
    tip.hide();
    if (event.shiftKey || event.pointerType === "touch") {
      const length = pointer.high - pointer.low;
      const low = Math.max(0, Math.min(pointer.low - ((x - pointer.from) / box.w) * length, this.range.most - length));
      this.range.set(low, low + length);
      return;
    }
    const [left, right] = [Math.min(x, pointer.from), Math.max(x, pointer.from)].map((one) => Math.max(box.x, Math.min(one, box.x + box.w)));
    this.brush.hidden = false;
    Object.assign(this.brush.style, { left: `${left}px`, width: `${right - left}px`, top: `${box.y}px`, height: `${box.h}px` });
  }

  up(event) {
    const pointer = this.pointers.get(event.pointerId);
    if (!pointer) return;
    const { box } = this;
    const marked = !this.brush.hidden;
    const [from, to] = [pointer.from, this.at(event)[0]].map((x) => this.range.time(Math.max(box.x, Math.min(x, box.x + box.w)), box));
    const still = Math.abs(this.at(event)[0] - pointer.from) <= 4 && !this.pinched;
    this.drop(event);
    if (marked) this.range.set(Math.min(from, to), Math.max(from, to));
    else if (still) this.click(event);
  }

  drop(event) {
    this.pointers.delete(event.pointerId);
    this.brush.hidden = true;
    if (!this.pointers.size) this.pinched = false;
  }

  key(event) {
    const { range } = this;
    const actions = {
      ArrowLeft: () => range.pan(-range.length / 8),
      ArrowRight: () => range.pan(range.length / 8),
      "+": () => range.zoom(0.6),
      "=": () => range.zoom(0.6),
      "-": () => range.zoom(1 / 0.6),
      0: () => range.all(),
      Home: () => range.all(),
      Escape: () => selection.clear(),
      ...this.options.keys,
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}

/** The strip in the bar: the whole run in little, and a frame around what the plots show. Drag it to move. */
function drawOverview(host, run, range) {
  const { compute, waits } = run.lanes;
  const share = (spans, columns) => {
    const sums = new Float64Array(columns);
    for (let i = 0; i < spans.start.length; i += 1) {
      const first = (spans.start[i] / range.most) * columns;
      const last = ((spans.start[i] + spans.length[i]) / range.most) * columns;
      for (let column = Math.floor(first); column <= Math.min(columns - 1, last); column += 1) {
        sums[column] += Math.max(0, Math.min(last, column + 1) - Math.max(first, column)) * (spans.fill[i] / 255);
      }
    }
    return sums;
  };
  let drawn = null; // sums are of the whole run: they change with the width alone
  const barsOf = (columns) => {
    if (drawn?.columns !== columns) drawn = { columns, bars: [[share(compute, columns), "computing"], [share(waits, columns), "demand"]] };
    return drawn.bars;
  };
  const plot = new Plot(host, {
    label: "The whole run: grey where modules computed, orange where they waited",
    height: 26, left: 0, right: 0, top: 2, bottom: 2,
    draw(ctx, box) {
      ctx.fillStyle = colour("wash");
      ctx.fillRect(0, box.y, box.w, box.h);
      const columns = Math.max(1, Math.floor(box.w));
      for (const [sums, name] of barsOf(columns)) {
        ctx.fillStyle = colour(name);
        for (let x = 0; x < columns; x += 1) {
          const tall = Math.min(1, sums[x]) * box.h;
          if (tall > 0.2) ctx.fillRect(x, box.y + box.h - tall, 1, tall);
        }
      }
      const [left, right] = [range.low, range.high].map((time) => (time / range.most) * box.w);
      ctx.fillStyle = colour("paper");
      ctx.globalAlpha = 0.7;
      ctx.fillRect(0, 0, left, 26);
      ctx.fillRect(right, 0, box.w - right, 26);
      ctx.globalAlpha = 1;
      ctx.strokeStyle = colour("accent");
      ctx.lineWidth = 1.5;
      ctx.strokeRect(left + 0.75, 0.75, Math.max(2, right - left - 1.5), 24.5);
    },
  });
  range.listeners.push(() => plot.redraw());
  const centre = (event) => {
    const [x] = plot.at(event);
    range.pan((x / plot.box.w) * range.most - (range.low + range.high) / 2);
  };
  plot.canvas.addEventListener("pointerdown", (event) => {
    plot.canvas.setPointerCapture(event.pointerId);
    centre(event);
  });
  plot.canvas.addEventListener("pointermove", (event) => event.buttons && centre(event));
}

// A canvas that redraws when its size, the theme or its data change, with a margin for axes and a tooltip.

const NARROW = 620;

class Plot {
  /**
   * `options`: label (for those who cannot see it), height (pixels, or a function of the width),
   * draw(ctx, box, plot), find(x, y, box) → {title, rows, pick?} or null, left and right (margins),
   * stops: {count, at(i, box) → [x, y]}, what the arrow keys step through.
   */
  constructor(host, options) {
    this.options = { left: 96, right: 16, top: 8, bottom: 26, ...options };
    this.root = element("div", { className: "plot" });
    this.canvas = element("canvas", { role: "img", "aria-label": options.label });
    if (!options.timed) this.canvas.className = "still";
    this.root.append(this.canvas);
    host.append(this.root);
    this.pending = false;
    this.width = 0;
    new ResizeObserver(() => this.resize()).observe(this.root);
    theme.listeners.push(() => this.redraw(true));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && tip.hide());
    if (!options.timed) this.canvas.addEventListener("click", (event) => this.click(event));
    if (options.stops) this.walk(options.stops);
  }

  get box() {
    const { left, right, top, bottom } = this.options;
    const x = this.width < NARROW ? Math.min(left, 66) : left;
    const margin = this.width < NARROW ? Math.min(right, 8) : right;
    return { x, y: top, w: Math.max(10, this.width - x - margin), h: Math.max(10, this.height - top - bottom) };
  }

  resize() {
    const width = this.root.clientWidth;
    const { height } = this.options;
    const tall = typeof height === "function" ? height(width) : height;
    if (width === this.width && tall === this.height) return;
    this.width = width;
    this.height = tall;
    this.redraw(true);
  }

  /** Draw before the next frame, or at once. */
  redraw(now = false) {
    if (!this.width) return;
    if (now) {
      this.paint();
    } else if (!this.pending) {
      this.pending = true;
      requestAnimationFrame(() => this.paint());
    }
  }

  paint() {
    this.pending = false;
    const ratio = Math.min(3, devicePixelRatio || 1);
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.height = `${this.height}px`;
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = FONT;
    this.options.draw(ctx, this.box, this);
  }

  at(event) {
    const frame = this.canvas.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  found(event) {
    const [x, y] = this.at(event);
    const { box } = this;
    const inside = x >= box.x && x <= box.x + box.w && y >= 0 && y <= this.height;
    return inside ? this.options.find?.(x, y, box) ?? null : null;
  }

  hover(event) {
    const found = event.buttons ? null : this.found(event);
    this.canvas.style.cursor = found?.pick ? "pointer" : "";
    if (found) tip.show(found, event.clientX, event.clientY);
    else tip.hide();
  }

  click(event) {
    const found = this.found(event);
    if (found && event.pointerType === "touch") tip.show(found, event.clientX, event.clientY);
    found?.pick?.();
  }

  /** Let the arrow keys step from bar to bar, and Enter choose one. */
  walk({ count, at }) {
    let stop = -1;
    this.canvas.tabIndex = 0;
    this.canvas.addEventListener("blur", () => tip.hide());
    this.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Enter: 0 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      stop = Math.max(0, Math.min(count - 1, stop + step));
      const [x, y] = at(stop, this.box);
      const found = this.options.find(x, y, this.box);
      const frame = this.canvas.getBoundingClientRect();
      if (found && step) tip.show(found, frame.left + x, frame.top + y);
      else if (event.key === "Enter") found?.pick?.();
    });
  }
}

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';

/** Horizontal grid lines with labels left of the box. `place` maps a value to y. */
function drawValueAxis(ctx, box, ticks, label, place) {
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (const value of ticks) {
    const y = Math.round(place(value)) + 0.5;
    ctx.fillStyle = colour(value === 0 ? "line" : "grid");
    ctx.fillRect(box.x, y - 0.5, box.w, 1);
    ctx.fillStyle = colour("faint");
    ctx.fillText(label(value), box.x - 8, y);
  }
}

/** Ticks below the box. `place` maps a value to x; labels that would collide are left out. */
function drawAcrossAxis(ctx, box, ticks, label, place, { grid = true } = {}) {
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  let free = -Infinity;
  for (const value of ticks) {
    const x = place(value);
    if (x < box.x - 1 || x > box.x + box.w + 1) continue;
    if (grid) {
      ctx.fillStyle = colour("grid");
      ctx.fillRect(Math.round(x), box.y, 1, box.h);
    }
    const text = label(value);
    const half = ctx.measureText(text).width / 2;
    const middle = Math.min(Math.max(x, half + 2), box.x + box.w + 8 - half);
    if (middle - half < free) continue;
    ctx.fillStyle = colour("faint");
    ctx.fillText(text, middle, box.y + box.h + 8);
    free = middle + half + 12;
  }
}

/** A dashed line across the box with its name above it, or below where there is no room or `below` says so. */
function drawLimit(ctx, box, y, name, text, { side = "right", below = y - box.y < 16 } = {}) {
  ctx.save();
  ctx.strokeStyle = colour(name);
  ctx.setLineDash([6, 4]);
  ctx.lineWidth = 1.25;
  ctx.beginPath();
  ctx.moveTo(box.x, y);
  ctx.lineTo(box.x + box.w, y);
  ctx.stroke();
  if (text) {
    ctx.textAlign = side;
    ctx.textBaseline = below ? "top" : "bottom";
    outlined(ctx, text, side === "right" ? box.x + box.w - 4 : box.x + 6, y + (below ? 3 : -2), name);
  }
  ctx.restore();
}

/** Text that stays readable on top of anything. */
function outlined(ctx, text, x, y, name = "soft") {
  ctx.save();
  ctx.setLineDash([]);
  ctx.lineWidth = 3;
  ctx.lineJoin = "round";
  ctx.strokeStyle = colour("paper");
  ctx.strokeText(text, x, y);
  ctx.fillStyle = colour(name);
  ctx.fillText(text, x, y);
  ctx.restore();
}

/** As many whole parts of a path as fit, from its end (where paths differ); "" where not even the last one does. */
function fitted(ctx, path, width) {
  let text = path;
  while (ctx.measureText(text).width > width) {
    const cut = text.indexOf(".");
    if (cut < 0) return "";
    text = text.slice(cut + 1);
  }
  return text;
}

/** First row of an ascending array whose value is greater than `value`. */
function upperBound(values, value) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

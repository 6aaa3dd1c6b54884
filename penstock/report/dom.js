// Elements. Text from a profile enters the page here, as text and never as markup.

/** An element with a class, attributes and children; strings become text nodes. */
function element(tag, { className, text, style, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

/** The parts of a section that a view fills. */
function section(id) {
  const root = document.getElementById(id);
  return {
    root,
    legend: root.querySelector(".legend"),
    figure: root.querySelector(".figure"),
    detail: root.querySelector(".detail"),
  };
}

/** What stands in for a plot of nothing. */
function empty(host, text) {
  host.append(element("p", { className: "empty", text }));
}

function aside(host, text) {
  host.append(element("p", { className: "aside", text }));
}

/** Fill a legend: [[colour name, label, "line" | "dash" | undefined], …]. */
function legend(host, keys) {
  host.replaceChildren(
    ...keys.map(([name, label, shape]) => {
      const swatch = element("i", { className: `swatch ${shape ?? ""}`, style: { background: `var(--${name})`, "border-color": `var(--${name})` } });
      return element("span", { className: "key" }, swatch, label);
    }),
  );
}

/** A button that does one thing. */
function button(text, action, attributes = {}) {
  const made = element("button", { type: "button", text, ...attributes });
  made.addEventListener("click", action);
  return made;
}

const tip = {
  get root() {
    return document.getElementById("tip");
  },

  /** Show {title, rows: [[label, value, colour name?], …]} beside the pointer. */
  show(found, x, y) {
    const list = element("dl");
    for (const [label, value, name] of found.rows) {
      const term = element("dt");
      if (name) term.append(element("i", { className: "swatch", style: { background: `var(--${name})` } }));
      term.append(label);
      list.append(term, element("dd", { text: value }));
    }
    this.root.replaceChildren(element("b", { text: found.title }), list);
    this.root.hidden = false;
    const { width, height } = this.root.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - width - 12 : x + 16;
    const top = y + 16 + height > innerHeight ? y - height - 12 : y + 16;
    this.root.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    this.root.style.top = `${Math.max(8, top)}px`;
  },

  hide() {
    this.root.hidden = true;
  },
};

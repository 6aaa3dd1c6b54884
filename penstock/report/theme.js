// Colours by name, from the style sheet, so that canvases follow it; light and dark.

const theme = {
  cache: new Map(),
  listeners: [],

  /** The current value of a colour variable. */
  colour(name) {
    if (!this.cache.has(name)) {
      this.cache.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
    }
    return this.cache.get(name);
  },

  get current() {
    return document.documentElement.dataset.theme ?? "light";
  },

  set(name) {
    document.documentElement.dataset.theme = name;
    this.cache.clear();
    for (const listener of this.listeners) listener();
  },

  /** Follow the system until the reader chooses; print in light. */
  start(button) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let chosen = null;
    const apply = () => {
      this.set(chosen ?? (dark.matches ? "dark" : "light"));
      button.textContent = this.current === "dark" ? "Light" : "Dark";
      button.setAttribute("aria-label", `Switch to ${button.textContent.toLowerCase()} colours`);
    };
    dark.addEventListener("change", apply);
    button.addEventListener("click", () => {
      chosen = this.current === "dark" ? "light" : "dark";
      apply();
    });
    addEventListener("beforeprint", () => this.set("light"));
    addEventListener("afterprint", apply);
    apply();
  },
};

const colour = (name) => theme.colour(name);

// What the reader has chosen: a module, or one span.

const selection = {
  module: -1,
  /** By module number: 1 for the chosen one and all inside it; null where none is chosen. */
  inside: null,
  /** {kind: "compute" | "transfer" | "wait", row} or null. */
  span: null,
  modules: [],
  listeners: [],

  changed() {
    for (const listener of this.listeners) listener();
  },

  /** Choose a module by its number; the same one again lets go of it. */
  choose(module) {
    this.module = module === this.module ? -1 : module;
    this.span = null;
    this.inside = this.module < 0 ? null : this.below(this.module);
    this.changed();
  },

  chooseSpan(kind, row) {
    this.span = { kind, row };
    this.changed();
  },

  clear() {
    this.module = -1;
    this.inside = null;
    this.span = null;
    this.changed();
  },

  below(module) {
    const inside = new Uint8Array(this.modules.length);
    for (let i = 0; i < inside.length; i += 1) {
      let above = i;
      for (let depth = 0; above >= 0 && depth < 64; depth += 1) {
        if (above === module) {
          inside[i] = 1;
          break;
        }
        above = this.modules[above]?.parent ?? -1;
      }
    }
    return inside;
  },

  /** Whether something of this module (−1: of none) is to be drawn faintly. */
  fades(module) {
    return this.inside !== null && !(module >= 0 && this.inside[module]);
  },
};

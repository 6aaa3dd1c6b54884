// What the page carries: JSON for names and figures, one compressed blob for numbers.

const ELEMENTS = { u1: Uint8Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
const PARTS_WITH_ARRAYS = ["bands", "lanes", "bubbles", "residency", "bandwidth"];
const LINKS = ["DISK_READ", "DISK_WRITE", "H2D", "D2H"];
const LINK_NAMES = { DISK_READ: "disk read", DISK_WRITE: "disk write", H2D: "host → device", D2H: "device → host" };
const LINK_COLOURS = { DISK_READ: "disk-read", DISK_WRITE: "disk-write", H2D: "h2d", D2H: "d2h" };
const CAUSES = ["prefetch", "demand", "evict", "writeback", "rows"];
const MARKS = ["used out of order", "used without being asked for", "order relearned", "blocks exchanged", "error", "out of memory", "note"];
const SERIOUS_MARKS = new Set([4, 5]);
const PHASES = ["forward", "backward", "optimizer"];
const PHASE_COLOURS = ["forward", "backward", "optimizer-phase"];
const TIERS = ["device", "host", "disk"];
const IDLE = {
  disk: "reading from disk",
  link: "crossing to the device",
  space: "no slot or not begun",
  host: "host: launching, Python",
  other: "no block awaited",
};

async function inflate(text) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i += 1) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Replace every reference in a tree of plain objects by the array that it means. */
function revive(value, blob) {
  if (value === null || typeof value !== "object") return value;
  if (value.of in ELEMENTS && "at" in value && "n" in value) {
    const found = new ELEMENTS[value.of](blob, value.at, value.n);
    if (!value.delta) return found;
    const sums = new Float64Array(value.n);
    let sum = 0;
    for (let i = 0; i < value.n; i += 1) sums[i] = sum += found[i];
    return sums;
  }
  if (Array.isArray(value)) return value.map((one) => revive(one, blob));
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, revive(one, blob)]));
}

/** Rows of the module table as objects; `path` is whole again, `leaf` is its last part. */
function nameModules(rows) {
  const modules = rows.map(([path, kind, parent, continues]) => ({ path, kind, parent, continues, done: !continues }));
  const complete = (module, depth) => {
    if (module.done || depth > 64) return module.path;
    module.done = true;
    const above = modules[module.parent];
    module.path = above ? `${complete(above, depth + 1)}.${module.path}` : module.path;
    return module.path;
  };
  for (const module of modules) {
    complete(module, 0);
    module.leaf = module.path.split(".").pop() || "(root)";
    module.path = module.path || "(root)";
  }
  return modules;
}

/** The page's document: its title, and its runs with arrays in place of references. */
async function readDocument() {
  const page = JSON.parse(document.getElementById("document").textContent);
  const blob = await inflate(document.getElementById("arrays").textContent);
  for (const run of page.runs) {
    for (const part of PARTS_WITH_ARRAYS) run[part] = revive(run[part], blob);
    run.modulesByNumber = nameModules(run.names.modules);
    run.blocks = run.names.blocks.map(([name, nbytes, home, module]) => ({ name, nbytes, home, module }));
    run.uses = run.modules.map(([number, path, kind, calls, waited, self, whole, moved, peak]) => ({ number, path, kind, calls, waited, self, whole, moved, peak }));
    run.ns = (ticks) => ticks * run.clock.tick;
    run.moduleName = (number) => run.modulesByNumber[number]?.path ?? "";
    run.blockName = (number) => run.blocks[number]?.name ?? "bytes of no block";
  }
  return page;
}

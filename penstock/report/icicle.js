// View 8: what filled memory at its peak, as an icicle of module paths.

const LEVEL = 27;

/** A tree of path parts from rows of (path, bytes); every node's bytes include those below it. */
function pathTree(rows) {
  const root = { name: "(root)", path: "", nbytes: 0, children: new Map(), own: 0 };
  for (const [path, nbytes] of rows) {
    if (!(nbytes > 0)) continue;
    let node = root;
    root.nbytes += nbytes;
    for (const part of path === "(root)" || path === "" ? [] : path.split(".")) {
      if (!node.children.has(part)) node.children.set(part, { name: part, path: node.path ? `${node.path}.${part}` : part, nbytes: 0, children: new Map(), own: 0 });
      node = node.children.get(part);
      node.nbytes += nbytes;
    }
    node.own += nbytes;
  }
  return root;
}

/** The whole tier: the modules, and beside them what belongs to no module. */
function peakTree(peak) {
  const modules = pathTree(peak.modules);
  const root = { name: `${peak.tier.toLowerCase()}`, path: "", nbytes: Math.max(peak.nbytes, 1), children: new Map() };
  const add = (name, nbytes, ink, children = new Map()) => nbytes > 0 && root.children.set(name, { name, path: name, nbytes, ink, children, outside: !children.size });
  add("modules", modules.nbytes, "weight", modules.children);
  const kept = peak.fragmentation_nbytes ?? 0;
  let rest = peak.nbytes - modules.nbytes - kept - Math.max(0, peak.unaccounted_nbytes);
  for (const [name, nbytes] of peak.categories.filter(([name]) => ["ARENA", "BASELINE", "LIBRARY"].includes(name))) {
    const mine = Math.min(nbytes, Math.max(0, rest));
    add(categoryName(name), mine, categoryColour(name));
    rest -= mine;
  }
  if (rest > peak.nbytes * 0.001) add("of no one module", rest, "baseline");
  add("unaccounted", peak.unaccounted_nbytes, "unaccounted");
  add("kept by the allocator", kept, "kept");
  root.nbytes = Math.max(1, [...root.children.values()].reduce((sum, child) => sum + child.nbytes, 0));
  return root;
}

function drawIcicle(page, run) {
  const { figure } = section("peak");
  if (!run.peaks.some((peak) => peak.nbytes > 0)) return empty(figure, "No bytes were recorded.");
  const peaks = run.peaks.filter((peak) => peak.nbytes > 0);
  const host = element("div", { className: "icicle" });
  const trail = element("span");
  const buttons = element("span", { className: "buttons" });
  const state = { peak: peaks[0], path: [] };
  const refresh = (changes) => {
    Object.assign(state, changes);
    for (const one of buttons.children) one.setAttribute("aria-pressed", String(one.textContent === state.peak.tier.toLowerCase()));
    fillIcicle(host, trail, run, state, refresh);
  };
  for (const peak of peaks) buttons.append(button(peak.tier.toLowerCase(), () => refresh({ peak, path: [] })));
  figure.append(element("div", { className: "tools" }, buttons, trail), host);
  refresh({});
  new ResizeObserver(() => fitLabels(host)).observe(host);
}

function fillIcicle(host, trail, run, state, refresh) {
  const { peak, path } = state;
  let root = peakTree(peak);
  for (const name of path) root = root.children.get(name) ?? root;
  const inside = path.length ? ` · ${path.slice(1).join(".") || "all modules"} ${formatBytes(root.nbytes)}` : "";
  const named = peak.named === null ? "" : `, ${formatShare(peak.named)} on named rows`;
  trail.textContent = `${formatBytes(peak.nbytes)} at ${formatInstant(run.ns(peak.at))}${named}${inside}`;
  host.replaceChildren();
  const nodes = [];
  layout(root, 0, 0, 1, null, [...path], nodes);
  const depth = Math.max(...nodes.map((node) => node.level)) + 1;
  host.style.height = `${depth * LEVEL}px`;
  for (const node of nodes) host.append(icicleNode(node, root, state, refresh));
}

/** Places nodes: children beside each other below their parent, the largest first; slivers are left out. */
function layout(node, level, left, width, ink, path, nodes) {
  const shade = node.ink ?? ink ?? "weight";
  nodes.push({ node, level, left, width, ink: level || path.length ? shade : "baseline", path });
  let x = left;
  for (const child of [...node.children.values()].sort((a, b) => b.nbytes - a.nbytes)) {
    const share = (child.nbytes / node.nbytes) * width;
    if (share > 0.002) layout(child, level + 1, x, share, shade, [...path, child.name], nodes);
    x += share;
  }
}

function icicleNode({ node, level, left, width, ink, path }, root, state, refresh) {
  const made = button("", () => refresh({ path: level === 0 ? path.slice(0, -1) : node.children.size ? path : state.path }));
  const share = formatShare(node.nbytes / root.nbytes);
  made.dataset.label = `${node.name} · ${formatBytes(node.nbytes)}`;
  made.setAttribute("aria-label", `${path.slice(1).join(".") || node.name}, ${formatBytes(node.nbytes)}, ${share}`);
  const pale = ["baseline", "library", "unaccounted", "kept"].includes(ink);
  made.className = pale ? "pale" : "";
  const tint = pale ? 0 : Math.min(36, Math.max(0, level - 1) * 9);
  Object.assign(made.style, { left: `${left * 100}%`, width: `${width * 100}%`, top: `${level * LEVEL}px`, background: `color-mix(in oklab, var(--${ink}), #10243a ${tint}%)` });
  const rows = [["bytes", formatBytes(node.nbytes)], ["share of this picture", share]];
  made.addEventListener("pointermove", (event) => tip.show({ title: path.slice(1).join(".") || node.name, rows }, event.clientX, event.clientY));
  made.addEventListener("pointerleave", () => tip.hide());
  requestAnimationFrame(() => fitLabel(made));
  return made;
}

/** A name only where there is room for it. */
function fitLabel(made) {
  made.textContent = made.clientWidth > 44 ? made.dataset.label : "";
}

function fitLabels(host) {
  for (const made of host.children) fitLabel(made);
}

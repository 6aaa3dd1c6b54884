// What is known of one span, and the chain of hops that brought a block.

/** Title and rows of a span, for the tooltip and for the box below the lanes. */
function describeSpan(run, kind, row) {
  if (kind === "mark") return describeMark(run, row);
  const spans = { step: run.lanes.steps, compute: run.lanes.compute, transfer: run.lanes.transfers, wait: run.lanes.waits }[kind];
  const length = run.ns(spans.length[row]);
  const rows = [["from", formatInstant(run.ns(spans.start[row]))], ["took", formatTime(length)]];
  const count = spans.count[row];
  const merged = count > 1;
  if (merged) rows.push(["stands for", `${formatCount(count)} spans, ${formatShare(spans.fill[row] / 255)} covered`]);
  if (kind === "step") {
    if (spans.tokens[row] >= 0) rows.push(["tokens", formatCount(spans.tokens[row])]);
    return { title: `${stepName(spans, row)}${merged ? " and others" : ""}`, rows };
  }
  if (kind === "compute") {
    const module = run.modulesByNumber[spans.module[row]];
    rows.push(["phase", PHASES[spans.phase[row]] ?? "?"]);
    if (module) rows.push(["class", module.kind]);
    return { title: `${module?.path ?? "unknown module"}${merged ? " and others" : ""}`, rows, module: spans.module[row] };
  }
  if (kind === "wait") {
    rows.push(["needed by", run.moduleName(spans.module[row]) || "unknown"]);
    if (merged) rows.push(["waited in all", formatTime(run.ns(spans.waited[row]))]);
    return { title: `Waiting for ${run.blockName(spans.block[row])}${merged ? " and others" : ""}`, rows, module: spans.module[row] };
  }
  const nbytes = spans.nbytes[row];
  rows.push(["bytes", formatBytes(nbytes)]);
  if (!merged && length > 0) rows.push(["rate", formatRate(nbytes / (length / 1e9))]);
  rows.push(["because of", CAUSES[spans.cause[row]] ?? "?"]);
  if (!merged) rows.push(["queued", formatTime(run.ns(spans.queued[row]))]);
  if (spans.failed[row]) rows.push(["ended", "in an error"]);
  const title = `${run.blockName(spans.block[row])}${merged ? " and others" : ""}: ${LINK_NAMES[LINKS[spans.link[row]]]}`;
  return { title, rows, module: spans.module[row] };
}

const stepName = (steps, row) => `${steps.phases[steps.phase[row]] || "step"} ${steps.id[row]}`;

function describeMark(run, row) {
  const { marks } = run.lanes;
  const rows = [["at", formatInstant(run.ns(marks.start[row]))]];
  if (marks.count[row] > 1) rows.push(["stands for", plural(marks.count[row], "mark")]);
  if (marks.block[row] >= 0) rows.push(["block", run.blockName(marks.block[row])]);
  if (marks.module[row] >= 0) rows.push(["module", run.moduleName(marks.module[row])]);
  if (marks.text[row]) rows.push(["says", marks.text[row]]);
  return { title: MARKS[marks.kind[row]] ?? "mark", rows };
}

/** Rows of transfers from the first hop to the last, through the given one; whether earlier hops are missing. */
function hopChain(run, row) {
  const { transfers } = run.lanes;
  const chain = [row];
  while (transfers.parent[chain[0]] >= 0 && chain.length < 16) chain.unshift(transfers.parent[chain[0]]);
  const cut = transfers.parent[chain[0]] < -1;
  for (let next = childOf(run, row); next >= 0 && chain.length < 16; next = childOf(run, next)) chain.push(next);
  return { chain, cut };
}

function childOf(run, row) {
  if (!run.children) {
    run.children = new Map();
    run.lanes.transfers.parent.forEach((parent, child) => parent >= 0 && run.children.set(parent, child));
  }
  return run.children.get(row) ?? -1;
}

/** The transfer that ended a wait: the last one of its block that ended by then. */
function bringerOf(run, row) {
  const { waits, transfers } = run.lanes;
  const ready = waits.start[row] + waits.length[row];
  let best = -1;
  for (let i = upperBound(transfers.start, ready) - 1, seen = 0; i >= 0 && seen < 4000; i -= 1, seen += 1) {
    if (transfers.block[i] !== waits.block[row] || transfers.count[i] > 1) continue;
    const end = transfers.start[i] + transfers.length[i];
    if (end <= ready + 2 && (best < 0 || end > transfers.start[best] + transfers.length[best])) best = i;
    if (best >= 0 && transfers.parent[best] < 0) break;
  }
  return best;
}

/** Keep the box below the lanes in step with what is chosen. */
function drawDetail(run, range) {
  const { detail } = section("lanes");
  selection.listeners.push(() => {
    detail.replaceChildren();
    const { span } = selection;
    if (span) detail.append(spanBox(run, range, span));
    else if (selection.module >= 0) detail.append(moduleBox(run));
  });
}

function moduleBox(run) {
  const module = run.modulesByNumber[selection.module];
  const rows = element("div", { className: "tools" }, element("span", { text: module.kind }));
  const use = run.uses.find(({ number }) => number === selection.module);
  if (use) {
    const figures = [["calls", formatCount(use.calls)], ["waited", formatTime(use.waited)], ["self time", formatTime(use.self)], ["moved", formatBytes(sumOf(use.moved))], ["peak", formatBytes(sumOf(use.peak))]];
    rows.append(...figures.map(([label, value]) => element("span", { text: `${label} ${value}` })));
  }
  rows.append(button("Let go (Esc)", () => selection.clear(), { class: "quiet" }));
  return element("div", { className: "box" }, element("h3", { text: module.path }), rows);
}

function spanBox(run, range, { kind, row }) {
  const found = describeSpan(run, kind, row);
  const box = element("div", { className: "box" }, element("h3", { text: found.title }));
  const tools = element("div", { className: "tools" });
  for (const [label, value] of found.rows) tools.append(element("span", { text: `${label} ${value}` }));
  box.append(tools);
  const hop = kind === "transfer" ? row : kind === "wait" ? bringerOf(run, row) : -1;
  const list = hopList(run, kind, row, hop);
  if (list) box.append(list);
  const spans = { compute: run.lanes.compute, transfer: run.lanes.transfers, wait: run.lanes.waits }[kind];
  const actions = element("div", { className: "tools", style: { margin: "12px 0 0" } });
  actions.append(button("Zoom to it", () => range.show(spans.start[row] - spans.length[row], spans.start[row] + 2 * spans.length[row]), { class: "quiet" }));
  if (found.module >= 0) actions.append(button("Highlight its module", () => selection.choose(found.module), { class: "quiet" }));
  actions.append(button("Let go (Esc)", () => selection.clear(), { class: "quiet" }));
  box.append(actions);
  return box;
}

function hopList(run, kind, row, hop) {
  if (hop < 0 || run.lanes.transfers.count[hop] > 1) return null;
  const { transfers } = run.lanes;
  const { chain, cut } = hopChain(run, hop);
  const list = element("ol", { className: "hops" });
  if (cut) list.append(element("li", { style: { "border-left-color": "var(--line)" } }, element("b", { text: "an earlier hop" }), element("span", { text: "merged with others, or lost" })));
  const first = chain[0];
  const issued = transfers.start[first] - transfers.queued[first];
  list.append(element("li", { style: { "border-left-color": "var(--faint)" } }, element("b", { text: "decided" }), element("span", { text: `at ${formatInstant(run.ns(issued))}` }), element("span", { text: `cause: ${CAUSES[transfers.cause[first]]}` })));
  for (const one of chain) {
    const length = run.ns(transfers.length[one]);
    const item = element("li", { className: one === row && kind === "transfer" ? "now" : "", style: { "border-left-color": `var(--${CAUSES[transfers.cause[one]]})` } });
    item.append(
      element("b", { text: LINK_NAMES[LINKS[transfers.link[one]]] }),
      element("span", { text: `${formatBytes(transfers.nbytes[one])} in ${formatTime(length)}${length > 0 ? `, ${formatRate(transfers.nbytes[one] / (length / 1e9))}` : ""}` }),
      element("span", { text: `after ${formatTime(run.ns(transfers.queued[one]))} in the queue` }),
    );
    list.append(item);
  }
  return list;
}

// View 5: the table of modules.

const PAGE_OF_ROWS = 60;
const sumOf = (parts) => Object.values(parts).reduce((sum, nbytes) => sum + nbytes, 0);

/** Columns: name, what to sort by, and how a cell is made from a row and the column's greatest value. */
const MODULE_COLUMNS = [
  { name: "module", key: (row) => row.path, text: true, cell: moduleCell },
  { name: "waited", key: (row) => row.waited, cell: (row, most) => measure(formatTime(row.waited), [["demand", row.waited / most]]) },
  { name: "self time", key: (row) => row.self, cell: (row, most) => measure(formatTime(row.self), [["forward", row.self / most]]) },
  { name: "moved", key: (row) => sumOf(row.moved), cell: (row, most) => measure(formatBytes(sumOf(row.moved)), parts(row.moved, most, LINK_COLOURS)) },
  { name: "peak", key: (row) => sumOf(row.peak), cell: (row, most) => measure(formatBytes(sumOf(row.peak)), parts(row.peak, most)) },
  { name: "calls", key: (row) => row.calls, number: true, cell: (row) => document.createTextNode(formatCount(row.calls)) },
];

function parts(values, most, colours) {
  return Object.entries(values).filter(([, nbytes]) => nbytes > 0).map(([name, nbytes]) => [colours?.[name] ?? categoryColour(name), nbytes / most, name]);
}

/** A value and its bar: parts are [colour name, share of the greatest value, name]. */
function measure(value, bars) {
  const track = element("span", { className: "track" });
  for (const [name, share, label] of bars) {
    track.append(element("span", { style: { background: `var(--${name})`, width: `${Math.max(share > 0 ? 1 : 0, share * 100)}%` }, title: LINK_NAMES[label] ?? CATEGORY_NAMES[label] ?? label }));
  }
  const text = bars.some(([, share]) => share > 0) ? value : "–";
  return element("div", { className: "measure" }, element("span", { className: "value", text }), track);
}

function moduleCell(row) {
  const name = row.number >= 0 ? button(row.path, (event) => event.stopPropagation() || selection.choose(row.number)) : element("span", { text: row.path });
  name.title = row.path;
  return element("span", {}, name, element("small", { text: row.kind }));
}

function drawModules(page, run) {
  const { legend: keys, figure } = section("modules");
  const rows = run.uses;
  if (!rows.length) return empty(figure, "No module was recorded.");
  const columns = MODULE_COLUMNS.filter((column) => column.text || rows.some((row) => column.key(row) > 0));
  const state = { rows, columns, sort: columns[1] ?? columns[0], descending: true, text: "", shown: PAGE_OF_ROWS };
  const search = element("input", { type: "search", placeholder: "Search modules and classes", "aria-label": "Search modules and classes" });
  const count = element("span");
  const body = element("tbody");
  const head = element("thead");
  const more = button("Show more", () => refresh({ shown: state.shown + 4 * PAGE_OF_ROWS }), { class: "quiet more" });
  const refresh = (changes = {}) => {
    Object.assign(state, changes);
    fillTable(state, { head, body, more, count }, refresh);
  };
  search.addEventListener("input", () => refresh({ text: search.value.trim().toLowerCase(), shown: PAGE_OF_ROWS }));
  search.addEventListener("keydown", (event) => {
    const first = event.key === "Enter" ? state.found?.find((row) => row.number >= 0) : null;
    if (first) selection.choose(first.number);
  });
  figure.append(element("div", { className: "tools" }, search, count), element("div", { className: "table-box" }, element("table", {}, head, body)), more);
  if (run.modules_left_out) aside(figure, `${formatCount(run.modules_left_out)} modules with less waiting and less time are left out.`);
  legend(keys, moduleKeys(rows));
  selection.listeners.push(() => markChosen(body));
  refresh();
}

function moduleKeys(rows) {
  const links = new Set(rows.flatMap((row) => Object.keys(row.moved)));
  const categories = new Set(rows.flatMap((row) => Object.keys(row.peak)));
  return [
    ...LINKS.filter((link) => links.has(link)).map((link) => [LINK_COLOURS[link], `moved: ${LINK_NAMES[link]}`]),
    ...CATEGORY_ORDER.filter((name) => categories.has(name)).map((name) => [categoryColour(name), `peak: ${categoryName(name)}`]),
  ];
}

function fillTable(state, places, refresh) {
  const { head, body, more, count } = places;
  const { sort, descending, columns } = state;
  const matches = state.text ? state.rows.filter((row) => `${row.path} ${row.kind}`.toLowerCase().includes(state.text)) : [...state.rows];
  const order = sort.text ? (a, b) => a.path.localeCompare(b.path, "en", { numeric: true }) : (a, b) => sort.key(a) - sort.key(b);
  state.found = matches.sort((a, b) => (descending ? -1 : 1) * order(a, b));
  head.replaceChildren(element("tr", {}, ...columns.map((column) => {
    const direction = descending ? "descending" : "ascending";
    const cell = element("th", { scope: "col", "aria-sort": column === sort ? direction : "none" });
    const arrow = column === sort ? (descending ? " ↓" : " ↑") : "";
    cell.append(button(column.name + arrow, () => refresh(column === sort ? { descending: !descending } : { sort: column, descending: !column.text })));
    return cell;
  })));
  const most = new Map(columns.map((column) => [column, column.text ? 1 : Math.max(1, ...state.rows.map(column.key))]));
  body.replaceChildren(...state.found.slice(0, state.shown).map((row) => {
    const made = element("tr", { className: row.number >= 0 ? "link" : "", "data-module": row.number });
    made.append(...columns.map((column) => element("td", { className: column.text ? "path" : column.number ? "number" : "" }, column.cell(row, most.get(column)))));
    if (row.number >= 0) made.addEventListener("click", () => selection.choose(row.number));
    return made;
  }));
  more.hidden = state.found.length <= state.shown;
  const hidden = Math.max(0, state.found.length - state.shown);
  count.textContent = `${plural(state.found.length, "module")}${hidden ? `, ${formatCount(hidden)} not shown` : ""}`;
  markChosen(body);
}

function markChosen(body) {
  for (const row of body.rows) row.setAttribute("aria-selected", String(Number(row.dataset.module) === selection.module && selection.module >= 0));
}

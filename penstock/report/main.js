// Puts the page together.

/** Draw one view; one that fails says so in its place and leaves the others alone. */
function view(id, draw, ...rest) {
  try {
    draw(...rest);
  } catch (error) {
    console.error(id, error);
    empty(section(id).figure, `This view could not be drawn: ${error.message}`);
  }
}

function drawBar(run, range) {
  const on = (id, action) => document.getElementById(id).addEventListener("click", action);
  on("zoom-in", () => range.zoom(0.5));
  on("zoom-out", () => range.zoom(2));
  on("zoom-all", () => range.all());
  const shown = document.getElementById("range");
  const say = () => {
    shown.textContent = String(range);
  };
  range.listeners.push(say);
  say();
  const focus = document.getElementById("focus");
  for (const [label, low, high] of run.focus) focus.append(button(label, () => range.show(low, high)));
  drawChosen();
  drawOverview(document.getElementById("overview"), run, range);
  drawLinks();
}

/** Say in the bar which module is highlighted: its lanes may be out of sight. */
function drawChosen() {
  const host = document.getElementById("chosen");
  selection.listeners.push(() => {
    host.replaceChildren();
    if (selection.module < 0) return;
    const show = () => document.getElementById("lanes").scrollIntoView();
    host.append(button(selection.modules[selection.module].path, show, { title: "Show in the lanes" }));
    host.append(button("×", () => selection.clear(), { "aria-label": "Let go of the module" }));
  });
}

/** Links to the views; the one in sight is marked. */
function drawLinks() {
  const host = document.getElementById("links");
  const sections = [...document.querySelectorAll("section:not([hidden])")];
  const links = new Map(sections.map((one) => [one, element("a", { href: `#${one.id}`, text: one.dataset.link })]));
  host.append(...links.values());
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-25% 0px -70% 0px" });
  for (const one of sections) watch.observe(one);
}

async function main() {
  theme.start(document.getElementById("theme"));
  addEventListener("pointerdown", () => tip.hide());
  const page = await readDocument();
  const [run] = page.runs;
  selection.run = run;
  selection.modules = run.modulesByNumber;
  const longest = Math.max(...page.runs.map((one) => one.ns(one.clock.ticks)));
  const range = new TimeRange(Math.ceil(longest / run.clock.tick), run.clock.tick);
  drawSummary(page, run);
  view("memory", drawBands, page, run, range);
  view("lanes", drawLanes, page, run, range);
  drawDetail(run, range);
  view("bubbles", drawBubbles, page, run, range);
  view("residency", drawResidency, page, run, range);
  view("modules", drawModules, page, run);
  view("bandwidth", drawBandwidth, page, run);
  view("leads", drawLeads, page, run);
  view("peak", drawIcicle, page, run);
  view("diff", drawDiff, page, run);
  drawBar(run, range);
  document.body.dataset.ready = "true";
}

main().catch((error) => {
  console.error(error);
  empty(document.getElementById("notes"), `This page could not read its own data (${error.message}). It needs a browser of 2023 or later.`);
});

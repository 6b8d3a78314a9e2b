"use strict";
// Draws the figures with plotly.js in the page's colours, and lets the keyboard do what a pointer can.

const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const DARK = matchMedia("(prefers-color-scheme: dark)");
const NARROW = matchMedia("(max-width: 640px)");
const CONFIG = { displayModeBar: false, scrollZoom: false };

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// A copy in which every "@name" is the page's colour of that name.
function coloured(value) {
  if (typeof value === "string") return value.startsWith("@") ? colour(value.slice(1)) : value;
  if (Array.isArray(value)) return value.map(coloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each)]));
}

function layoutOf(plot, name) {
  const layout = coloured(plot.layout);
  const family = getComputedStyle(document.body).fontFamily;
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
  for (const key of Object.keys(layout)) {
    if (!/^[xy]axis/.test(key)) continue;
    layout[key] = { ...axis, ...layout[key] };
    if (layout[key].title) layout[key].title = { ...layout[key].title, font: { size: 13, color: colour("muted") }, standoff: 8 };
  }
  const touch = NARROW.matches ? { dragmode: false } : {};
  return {
    font: { family, size: 13, color: colour("text") }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 60, r: 12, t: layout.title ? 32 : 10, b: layout.xaxis.title ? 46 : 28 }, hovermode: "closest",
    showlegend: false,
    hoverlabel: { align: "left", bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("text"), family } },
    ...layout, ...touch,
    title: layout.title && { ...layout.title, x: 0, xanchor: "left", y: 0.99, yanchor: "top", font: { size: 14 } },
    ...(name === "timeline" ? timelineLayout(layout) : {}),
  };
}

function chosen(name) {
  const radio = document.querySelector(`input[name="${name}"]:checked`);
  return FIGURES[name][radio ? radio.value : Object.keys(FIGURES[name])[0]];
}

function draw(name) {
  chosen(name).forEach((plot, number) => {
    const place = document.getElementById(`${name}-${number}`);
    const size = { width: place.clientWidth, height: place.clientHeight };
    Plotly.react(place, coloured(plot.data), { ...layoutOf(plot, name), ...size }, CONFIG);
  });
}

const drawAll = () => Object.keys(FIGURES).forEach(draw);

// ---- the timeline

const timeline = document.getElementById("timeline-0");
const FULL = timeline && FIGURES.timeline && chosen("timeline")[0].layout.xaxis.range;
let view = null;
let pointing = 0;
let current = null; // the action that the keyboard has chosen: its trace and number

function timelineLayout(layout) {
  view = view || (NARROW.matches ? [FULL[0], FULL[0] + (FULL[1] - FULL[0]) * 0.3] : FULL.slice());
  return {
    xaxis: { ...layout.xaxis, range: view.slice() }, margin: { l: 62, r: 8, t: 4, b: 48 },
  };
}

function show(from, until) {
  const length = Math.min(until - from, FULL[1] - FULL[0]);
  const begin = Math.min(Math.max(from, FULL[0]), FULL[1] - length);
  view = [begin, begin + length];
  Plotly.relayout(timeline, { "xaxis.range": view.slice() });
}

const zoom = (factor) => {
  const middle = (view[0] + view[1]) / 2, half = ((view[1] - view[0]) / 2) * factor;
  show(middle - half, middle + half);
};
const pan = (share) => { const by = (view[1] - view[0]) * share; show(view[0] + by, view[1] + by); };
const DO = {
  left: () => pan(-0.3), right: () => pan(0.3), in: () => zoom(0.5), out: () => zoom(2), all: () => show(FULL[0], FULL[1]),
};

// The actions of each row that can be seen at this zoom, in order of time. A row is a stage of a panel.
function rows() {
  const found = new Map();
  timeline.data.forEach((trace, at) => {
    trace.y.forEach((stage, number) => {
      if (trace.x[number] < (view[1] - view[0]) / 1000) return;
      const key = `${(trace.yaxis || "y").slice(1).padStart(4, "0")}/${String(stage).padStart(6, "0")}`;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push({ at, number, begin: trace.base[number], length: trace.x[number] });
    });
  });
  const sorted = [...found.keys()].sort().map((key) => found.get(key));
  sorted.forEach((row) => row.sort((a, b) => a.begin - b.begin));
  return sorted;
}

function tell(action) {
  const text = timeline.data[action.at].customdata[action.number];
  document.getElementById("details").innerHTML = text; // written by this page's maker, and escaped there
}

function choose(action) {
  current = action;
  const end = action.begin + action.length;
  if (action.begin < view[0] || end > view[1]) {
    const half = (view[1] - view[0]) / 2;
    show(action.begin - half, action.begin + half);
  }
  tell(action);
  clearTimeout(pointing); // plotly.js forgets what comes in quick succession
  pointing = setTimeout(() => Plotly.Fx.hover(timeline, [{ curveNumber: action.at, pointNumber: action.number }]), 80);
}

function step(key) {
  const all = rows();
  let row = current && all.findIndex((each) => each.some((a) => a.at === current.at && a.number === current.number));
  if (current === null || row < 0) return choose(all[0].find((a) => a.begin >= view[0]) || all[0][0]);
  const number = all[row].findIndex((a) => a.at === current.at && a.number === current.number);
  if (key === "ArrowLeft") return choose(all[row][Math.max(number - 1, 0)]);
  if (key === "ArrowRight") return choose(all[row][Math.min(number + 1, all[row].length - 1)]);
  row = Math.min(Math.max(row + (key === "ArrowUp" ? -1 : 1), 0), all.length - 1);
  const away = (action) => Math.abs(action.begin - current.begin);
  return choose(all[row].reduce((best, action) => (away(action) < away(best) ? action : best)));
}

const BUTTONS = [["left", "←", "earlier"], ["right", "→", "later"], ["in", "+", "zoom in"], ["out", "−", "zoom out"], ["all", "All", "all"]];

function addTools() {
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.setAttribute("role", "toolbar");
  tools.setAttribute("aria-label", "Timeline");
  for (const [name, text, label] of BUTTONS) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: text, ariaLabel: label });
    button.addEventListener("click", DO[name]);
    tools.append(button);
  }
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.textContent = NARROW.matches
    ? "Tap an action to see what it is; zoom with the buttons."
    : "Drag to zoom. By keyboard, in the picture: arrows go from action to action, + − 0 zoom.";
  tools.append(hint);
  const details = document.createElement("p");
  Object.assign(details, { className: "details", id: "details", textContent: "Point at an action to see what it is." });
  details.setAttribute("aria-live", "polite");
  timeline.parentElement.before(tools);
  timeline.parentElement.after(details);
}

function listen() {
  timeline.tabIndex = 0;
  timeline.setAttribute("role", "application");
  timeline.addEventListener("keydown", (event) => {
    const keys = { "+": DO.in, "=": DO.in, "-": DO.out, 0: DO.all, Home: DO.all };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key.startsWith("Arrow")) step(event.key);
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
  timeline.on("plotly_hover", (event) => {
    const point = event.points[0];
    if (point.customdata) tell({ at: point.curveNumber, number: point.pointNumber });
  });
  timeline.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change) view = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else if (change["xaxis.autorange"]) show(FULL[0], FULL[1]);
  });
}

drawAll();
if (FULL) {
  addTools();
  listen();
}
document.querySelectorAll(".choice input").forEach((radio) => radio.addEventListener("change", () => draw(radio.name)));
for (const query of [DARK, NARROW]) query.addEventListener("change", drawAll);
// On paper: light, and as wide as paper before the browser measures the pages.
const paper = (isPaper) => {
  document.documentElement.classList.toggle("paper", isPaper);
  drawAll();
};
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
let later = 0;
addEventListener("resize", () => {
  clearTimeout(later);
  later = setTimeout(drawAll, 100);
});
document.documentElement.dataset.drawn = "yes";

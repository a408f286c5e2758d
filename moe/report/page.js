"use strict";
/* Read-outs for the charts, the heatmap's slider, the layer and expert choice, the theme. The page is whole without it. */
document.documentElement.classList.add("js");
const numbersOf = (figure) => JSON.parse(figure.querySelector("script[type='application/json']").textContent);
const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

/* theme: the system's, until the button says otherwise */
const remembered = {
  // Reading storage throws where a browser blocks it for local files: the choice then lasts as long as the page.
  get() { try { return localStorage.getItem("moe-report-theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("moe-report-theme", value); } catch { /* as above */ } },
};
if (remembered.get()) document.documentElement.dataset.theme = remembered.get();
document.getElementById("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  remembered.set(document.documentElement.dataset.theme);
});

/* charts */
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

function readout(figure) {
  const canvas = figure.querySelector(".canvas");
  let data = null, densest = null, at = -1;
  const cursor = make("div", "cursor"), tip = make("div", "tip");
  tip.setAttribute("role", "status");
  cursor.hidden = tip.hidden = true;
  canvas.append(cursor, tip);

  function load() {
    if (data) return;
    data = numbersOf(figure);
    densest = data.series.reduce((most, one) => (one.steps.length > most.steps.length ? one : most));
  }
  function show(index) {
    at = Math.max(0, Math.min(densest.steps.length - 1, index));
    const step = densest.steps[at], share = (step - data.x[0]) / (data.x[1] - data.x[0]);
    cursor.replaceChildren();
    tip.replaceChildren(make("b", "", "step " + step.toLocaleString("en")));
    for (const one of data.series) {
      const own = nearest(one.steps, step), elsewhere = one.steps[own] !== step;
      const row = make("span", ""), mark = make("i", one.style), dot = make("i", one.style);
      mark.classList.add("key");
      const where = elsewhere ? " @ " + one.steps[own].toLocaleString("en") : "";
      row.append(mark, one.name + where, make("em", "", one.text[own] + (data.unit && " " + data.unit)));
      tip.append(row);
      if (!elsewhere) { dot.style.top = 100 * (1 - one.y[own]) + "%"; cursor.append(dot); }
    }
    cursor.style.left = 100 * share + "%";
    cursor.hidden = tip.hidden = false;
    const room = canvas.clientWidth, width = tip.offsetWidth, x = share * room;
    tip.style.left = Math.max(-40, Math.min(room - width, x + 14 + width > room ? x - 14 - width : x + 14)) + "px";
  }
  const hide = () => { cursor.hidden = tip.hidden = true; };
  const point = (event) => {
    load();
    const box = canvas.getBoundingClientRect();
    show(nearest(densest.steps, data.x[0] + ((event.clientX - box.left) / box.width) * (data.x[1] - data.x[0])));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    load();
    const end = densest.steps.length - 1, far = Math.max(1, Math.round(end / 20));
    const start = at < 0 ? end : at;
    const moves = { ArrowLeft: start - 1, ArrowRight: start + 1, PageDown: start - far, PageUp: start + far, Home: 0, End: end };
    if (event.key === "Escape") hide();
    else if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
}
document.querySelectorAll(".chart").forEach(readout);

/* heatmap through time: the same colours as moe/report/heatmap.py */
const heat = document.getElementById("heat"), slider = heat && heat.querySelector(".slider");
if (slider) {
  const data = numbersOf(heat), experts = Number(heat.dataset.experts), cells = heat.querySelectorAll("td");
  const input = slider.querySelector("input"), note = heat.querySelector(".note");
  input.addEventListener("input", () => {
    const frame = data.frames[input.value], step = data.steps[input.value].toLocaleString("en");
    slider.querySelector("output").textContent = step;
    input.setAttribute("aria-valuetext", "step " + step);
    cells.forEach((cell, index) => {
      const share = frame[index] / data.unit, load = share * experts;
      cell.className = (load > 1 ? "over" : "under") + (share === 0 ? " dead" : "");
      cell.style.setProperty("--p", Math.round(100 * Math.min(1, Math.abs(load - 1))) + "%");
      cell.textContent = (100 * share).toFixed(1);
    });
    const most = frame.indexOf(Math.max(...frame)), share = frame[most] / data.unit;
    note.textContent = `Fullest: expert ${most % experts} of layer ${data.layers[Math.floor(most / experts)]} with ` +
      `${(100 * share).toFixed(1)} % of its layer's choices, ${(share * experts).toFixed(2)} × its even share. (Step ${step}.)`;
  });
}

/* text coloured by expert */
const routed = document.getElementById("routed");
if (routed) {
  const { layers, experts } = numbersOf(routed), text = routed.querySelector(".tokens");
  const tokens = [...routed.querySelectorAll(".t")], chips = [...routed.querySelectorAll(".chip")];
  let place = 0, only = null;
  const classOf = (expert) => `c${expert % 8} u${Math.floor(expert / 8) % 4}`; // as moe/report/palette.py
  function paint() {
    const counts = new Map();
    tokens.forEach((token, index) => {
      const expert = experts[place][index];
      counts.set(expert, (counts.get(expert) || 0) + 1);
      token.className = expert === null ? "t" : `t ${classOf(expert)}${expert === only ? " on" : ""}`;
      token.dataset.e = expert ?? "–";
      token.title = `layer ${layers[place]}: ${expert === null ? "no expert" : `expert ${expert}`}`;
    });
    for (const chip of chips) {
      const expert = Number(chip.dataset.e);
      chip.querySelector("small").textContent = Math.round((100 * (counts.get(expert) || 0)) / tokens.length) + " %";
      chip.setAttribute("aria-pressed", String(expert === only));
    }
    text.classList.toggle("only", only !== null);
  }
  routed.querySelector(".layers").addEventListener("change", (event) => { place = Number(event.target.value); paint(); });
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      only = only === Number(chip.dataset.e) ? null : Number(chip.dataset.e);
      paint();
    });
  }
  routed.querySelector(".numbers input").addEventListener("change", (event) => {
    text.classList.toggle("with-numbers", event.target.checked);
  });
  paint();
}

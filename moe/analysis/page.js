"use strict";
/* Draws the figures in the theme's colours, and everything that depends on the chosen layer. */
document.documentElement.classList.add("js");
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
let layer = document.querySelector("#layers input:checked").value;

/* theme: the system's, until the button says otherwise */
const remembered = {
  // Reading storage throws where a browser blocks it for local files: the choice then lasts as long as the page.
  get() { try { return localStorage.getItem("moe-report-theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("moe-report-theme", value); } catch { /* as above */ } },
};
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
if (remembered.get()) root.dataset.theme = remembered.get();
document.getElementById("theme").addEventListener("click", () => {
  const now = root.dataset.theme || (systemIsDark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  remembered.set(root.dataset.theme);
  drawAll();
});
systemIsDark.addEventListener("change", () => drawAll());

/* figures */
const probe = document.body.appendChild(make("i", ""));
probe.hidden = true;
function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
function themed(value) {
  if (typeof value === "string") {
    if (value === "diverging") return [[0, colour("under")], [0.5, colour("cell")], [1, colour("over")]];
    const found = /^var\(--(\w+)\)$/.exec(value);
    return found ? colour(found[1]) : value;
  }
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, themed(one)]));
  }
  return value;
}
function draw(box) {
  const name = box.dataset.figure;
  const byLayer = data.by_layer[name];
  const figure = byLayer ? byLayer[layer] : data.figures[name];
  if (!figure) return;
  const { data: traces, layout } = themed(figure);
  const axis = { gridcolor: colour("grid"), zerolinecolor: colour("hair"), linecolor: colour("hair"), automargin: true, fixedrange: true };
  const square = traces[0].type === "heatmap";
  if (traces.length === 1 && !square) traces[0].showlegend = false;
  Plotly.react(box, traces, {
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("muted") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("hair"), font: { color: colour("ink") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    margin: { l: 48, r: 12, t: 8, b: 40 },
    bargap: 0.25,
  }, { displayModeBar: false, responsive: true });
}
function drawAll() { document.querySelectorAll("[data-figure]").forEach(draw); }

/* text by expert */
const routed = document.getElementById("routed"), tokens = routed.querySelector(".tokens"), chips = routed.querySelector(".chips");
const classOf = (expert) => `c${expert % 8} u${Math.floor(expert / 8) % 4}`; // as moe/report/palette.py
let text = data.texts[0], place = 0, only = null, spans = [];
// Line ends are seen and kept, control characters are named.
const visible = (token) => token.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g,
  (one) => `\\x${one.charCodeAt(0).toString(16).padStart(2, "0")}`).replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");

function radios(fieldset, labels, chosen) {
  labels.forEach((label, index) => {
    const input = Object.assign(document.createElement("input"), { type: "radio", name: fieldset.id, checked: index === 0 });
    const outer = make("label", "");
    input.addEventListener("change", () => chosen(index));
    outer.append(input, make("span", "", label));
    fieldset.append(outer);
  });
}
function showText() {
  spans = text.tokens.map((token) => make("span", "t", visible(token)));
  tokens.replaceChildren(...spans);
}
function paint() {
  const experts = text.experts[place][layer], counts = new Map();
  experts.forEach((expert, index) => {
    counts.set(expert, (counts.get(expert) || 0) + 1);
    spans[index].className = expert < 0 ? "t" : `t ${classOf(expert)}${expert === only ? " on" : ""}`;
    spans[index].title = `layer ${layer}: ${expert < 0 ? "no expert" : `expert ${expert}`}`;
  });
  tokens.classList.toggle("only", only !== null);
  chips.replaceChildren();
  for (let expert = 0; expert < data.num_experts[layer]; expert += 1) {
    const chip = make("button", `chip ${classOf(expert)}`, String(expert));
    chip.type = "button";
    chip.setAttribute("aria-pressed", String(expert === only));
    chip.append(make("small", "", Math.round((100 * (counts.get(expert) || 0)) / experts.length) + " %"));
    chip.addEventListener("click", () => { only = only === expert ? null : expert; paint(); });
    chips.append(chip);
  }
}

/* favourites */
function favourites() {
  const box = document.getElementById("favourites");
  box.replaceChildren();
  data.favourites[layer].forEach((own, expert) => {
    const card = make("article", "");
    card.append(make("h3", classOf(expert), `Expert ${expert}`));
    for (const [title, list] of [["tokens", own.token], ["tokens before them", own.previous]]) {
      const items = make("ul", "");
      for (const [token, lift] of list) {
        const item = make("li", "", token === " " ? "␣" : visible(token).trimEnd() || "␣");
        item.append(make("small", "", `${lift < 10 ? lift.toFixed(1) : Math.round(lift)}×`));
        items.append(item);
      }
      card.append(make("h4", "", list.length ? title : `${title}: none`), items);
    }
    if (own.contexts.length) card.append(make("h4", "", "most weight"));
    for (const [source, weight, before, token, after] of own.contexts) {
      const line = make("p", "");
      const flat = (part) => visible(part).replace(/\n/g, "");
      line.append(flat(before), make("mark", classOf(expert), flat(token)), flat(after), make("span", "", `  ${source}, ${weight.toFixed(2)}`));
      card.append(line);
    }
    box.append(card);
  });
}

function chooseLayer(value) {
  layer = value;
  only = null;
  document.querySelectorAll("[data-figure]").forEach((box) => { if (data.by_layer[box.dataset.figure]) draw(box); });
  paint();
  favourites();
}
document.getElementById("layers").addEventListener("change", (event) => chooseLayer(event.target.value));
radios(document.getElementById("sources"), data.texts.map((one) => one.source), (index) => { text = data.texts[index]; showText(); paint(); });
radios(document.getElementById("places"), ["first", "second"], (index) => { place = index; paint(); });
drawAll();
showText();
paint();
favourites();

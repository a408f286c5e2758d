"use strict";
/* Draws the charts in the page's colours, light or dark. */
document.documentElement.classList.add("js");
const remembered = {
  // Reading storage throws where a browser blocks it for local files: the choice then lasts as long as the page.
  get() { try { return localStorage.getItem("moe-report-theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("moe-report-theme", value); } catch { /* as above */ } },
};
if (remembered.get()) document.documentElement.dataset.theme = remembered.get();
const dark = matchMedia("(prefers-color-scheme: dark)");

const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
function resolved(name) {
  if (name === "sans") return getComputedStyle(document.body).fontFamily;
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
function coloured(node) {
  if (typeof node === "string") return /^@[a-z0-9]+$/.test(node) ? resolved(node.slice(1)) : node;
  if (Array.isArray(node)) return node.map(coloured);
  if (node && typeof node === "object") return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, coloured(value)]));
  return node;
}
function draw() {
  for (const place of document.querySelectorAll(".plotly-chart")) {
    const figure = coloured(JSON.parse(place.nextElementSibling.textContent));
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  }
}
draw();
const resized = new ResizeObserver((changes) => { for (const change of changes) Plotly.Plots.resize(change.target); });
for (const place of document.querySelectorAll(".plotly-chart")) resized.observe(place);
dark.addEventListener("change", draw);
document.getElementById("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  remembered.set(document.documentElement.dataset.theme);
  draw();
});

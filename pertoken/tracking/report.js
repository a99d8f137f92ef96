"use strict";
// Draws the charts and the token view of a run. Text of a model enters the page through textContent only.

const run = JSON.parse(document.getElementById("run").textContent);
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- theme: follows the system until the reader chooses; ?theme=dark sets it from outside

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
}

function nextTheme() {
  const order = ["auto", "light", "dark"];
  const now = document.documentElement.dataset.theme || "auto";
  setTheme(order[(order.indexOf(now) + 1) % order.length]);
}

// ---- charts

function drawCharts() {
  const options = { responsive: true, displayModeBar: false, displaylogo: false };
  for (const place of document.querySelectorAll(".plot")) {
    const { data, layout } = run.charts[Number(place.dataset.chart)];
    Plotly.newPlot(place, data, layout, options);
  }
}

// ---- token view

let wantedStream = "advantage";
const scaleOf = (name) => run.scales.find((scale) => scale.name === name);
const neutral = (scale) => (scale.kind === "around_one" ? 1 : 0);
const FULL_STRENGTH = 62; // percent: the text on the colour stays readable in both themes

function tone(scale, value) {
  if (scale.kind === "magnitude") return "var(--magnitude)";
  return value < neutral(scale) ? "var(--negative)" : "var(--positive)";
}

function strength(scale, value) {
  if (!scale || value === null || value === undefined) return 0;
  return Math.min(1, Math.abs(value - neutral(scale)) / scale.bound) * FULL_STRENGTH;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return digits.replace("-", "−");
}

// What cannot be seen is shown by a sign: line ends, control characters, tokens without text of their own.
function visible(piece) {
  if (piece === "") return "▯";
  return piece.replace(/[\u0000-\u0009\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

function tokenText(piece) {
  const parts = visible(piece).split("\n");
  return parts.flatMap((part, i) => (i === 0 ? [part] : [element("i", { textContent: "↵" }), "\n" + part]));
}

function tokenNode(panel, index) {
  const chosen = panel.tokens.action[index] === 1;
  const node = element("span", { className: chosen ? "token" : "token given", tabIndex: -1 });
  node.append(...tokenText(panel.tokens.piece[index]));
  node.setAttribute("role", "option");
  node.addEventListener("mouseenter", () => showTip(node, panel, index));
  node.addEventListener("mouseleave", hideTip);
  node.addEventListener("focus", () => showTip(node, panel, index));
  node.addEventListener("blur", hideTip);
  return node;
}

function tokenList(panel) {
  const nodes = panel.tokens.piece.map((_, index) => tokenNode(panel, index));
  const list = element("div", { className: "text", dir: "auto" }, ...nodes);
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", `${panel.title}: tokens, arrow keys move`);
  if (nodes.length) nodes[0].tabIndex = 0;
  list.addEventListener("keydown", (event) => {
    const target = neighbour(nodes, nodes.indexOf(document.activeElement), event.key);
    if (!target) return;
    event.preventDefault();
    nodes.forEach((node) => (node.tabIndex = -1));
    target.tabIndex = 0;
    target.focus();
  });
  return list;
}

// Left and right follow the order of the tokens, up and down the lines on the screen.
function neighbour(nodes, at, key) {
  if (key === "ArrowRight") return nodes[at + 1];
  if (key === "ArrowLeft") return nodes[at - 1];
  if (key === "Home") return nodes[0];
  if (key === "End") return nodes[nodes.length - 1];
  if (key !== "ArrowDown" && key !== "ArrowUp") return null;
  const here = nodes[at].getClientRects()[0];
  const down = key === "ArrowDown";
  const others = down ? nodes.slice(at + 1) : nodes.slice(0, at).reverse();
  const boxes = others.map((node) => [node, node.getClientRects()[0]]);
  const away = boxes.filter(([, box]) => (down ? box.top > here.top + 4 : box.top < here.top - 4));
  const line = away.filter(([, box]) => Math.abs(box.top - away[0][1].top) < 4);
  line.sort(([, a], [, b]) => Math.abs(a.left - here.left) - Math.abs(b.left - here.left));
  return line.length ? line[0][0] : null;
}

function panelNode(panel) {
  const node = element("article", { className: "panel" }, element("h3", { textContent: panel.title }));
  node.append(element("p", { className: "about", textContent: panel.facts.join(" · ") }));
  if (panel.prompt) node.append(fold("Prompt", panel.prompt));
  if (panel.answer) node.append(fold("Reference answer", panel.answer));
  node.append(panel.tokens ? tokenList(panel) : element("div", { className: "text", dir: "auto", textContent: panel.text }));
  if (panel.tokens) node.append(element("p", { className: "about sum" }));
  return node;
}

function fold(title, text) {
  return element(
    "details",
    {},
    element("summary", { textContent: title }),
    element("div", { className: "prompt", dir: "auto", textContent: text }),
  );
}

function showScene() {
  hideTip();
  byId("panels").replaceChildren(...currentScene().panels.map(panelNode));
  fillStreams();
  paint();
}

const currentScene = () => run.scenes[byId("scene").selectedIndex];

// Colours the tokens that are on the page; the text itself stays, so focus and reading place are kept.
function paint() {
  const scale = scaleOf(byId("stream").value);
  const panels = currentScene().panels;
  byId("panels").querySelectorAll(".panel").forEach((node, i) => {
    const values = (panels[i].streams || {})[scale && scale.name] || [];
    node.querySelectorAll(".token").forEach((token, t) => {
      const acts = panels[i].tokens.action[t] === 1;
      token.style.setProperty("--strength", `${acts ? strength(scale, values[t]) : 0}%`);
      if (scale) token.style.setProperty("--tone", tone(scale, values[t]));
    });
    const sum = node.querySelector(".sum");
    if (sum) sum.textContent = summary(scale, values, panels[i].tokens.action);
  });
  showLegend(scale);
}

function summary(scale, values, action) {
  const known = values.filter((value, t) => action[t] === 1 && value !== null);
  if (!scale || !known.length) return "";
  const sum = known.reduce((a, b) => a + b, 0);
  const text = scale.name.startsWith("reward/") ? `sum ${short(sum)}` : `mean ${short(sum / known.length)}`;
  return `${scale.label}: ${text} over ${known.length} tokens`;
}

function showLegend(scale) {
  if (!scale) return byId("legend").replaceChildren("These samples were saved without numbers per token.");
  const mix = (color) => `color-mix(in srgb, var(--${color}) ${FULL_STRENGTH}%, transparent)`;
  const bar = element("span", { className: "bar" });
  const zero = neutral(scale);
  let ends = [`≤ ${short(zero - scale.bound)}`, `≥ ${short(zero + scale.bound)}`];
  if (scale.kind === "magnitude") {
    bar.style.background = `linear-gradient(90deg, transparent, ${mix("magnitude")})`;
    ends = ["0", `|x| ≥ ${short(scale.bound)}`];
  } else {
    bar.style.background = `linear-gradient(90deg, ${mix("negative")}, transparent, ${mix("positive")})`;
  }
  return byId("legend").replaceChildren(ends[0], bar, ends[1], element("span", { textContent: scale.meaning }));
}

function showTip(node, panel, index) {
  const acts = panel.tokens.action[index] === 1;
  const piece = visible(panel.tokens.piece[index]).replaceAll("\n", "↵");
  const rows = run.scales
    .filter((scale) => acts && scale.name in panel.streams)
    .map((scale) => {
      const row = element("tr", {}, element("th", { textContent: scale.label }));
      row.append(element("td", { textContent: short(panel.streams[scale.name][index]) }));
      if (scale.name === byId("stream").value) row.className = "chosen";
      return row;
    });
  const about = `token ${index + 1} of ${panel.tokens.piece.length}, id ${panel.tokens.id[index]}`;
  const tip = byId("tip");
  tip.replaceChildren(
    element("b", { textContent: `“${piece}”` }),
    element("div", { textContent: acts ? about : `${about}, not chosen by the model` }),
    element("table", {}, ...rows),
  );
  tip.hidden = false;
  placeTip(tip, node.getClientRects()[0]);
  node.setAttribute("aria-describedby", "tip");
}

function placeTip(tip, box) {
  const room = document.documentElement.clientWidth - tip.offsetWidth - 12;
  const below = box.bottom + 8 + tip.offsetHeight < window.innerHeight || box.top < tip.offsetHeight + 8;
  const top = below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight;
  tip.style.left = `${window.scrollX + Math.max(12, Math.min(box.left, room))}px`;
  tip.style.top = `${window.scrollY + top}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function fillScenes() {
  const groups = new Map();
  run.scenes.forEach((scene) => {
    if (!groups.has(scene.group)) groups.set(scene.group, element("optgroup", { label: scene.group }));
    groups.get(scene.group).append(element("option", { textContent: scene.title }));
  });
  byId("scene").append(...groups.values());
}

// Offers the streams that this scene has, and stays with the reader's choice where it can.
function fillStreams() {
  const here = run.scales.filter((scale) => currentScene().panels.some((panel) => scale.name in (panel.streams || {})));
  byId("stream").replaceChildren(...here.map((scale) => element("option", { value: scale.name, textContent: scale.label })));
  const wish = [wantedStream, "advantage", "reward/total"].find((name) => here.some((scale) => scale.name === name));
  if (wish) byId("stream").value = wish;
}

function moveScene(by) {
  const count = run.scenes.length;
  byId("scene").selectedIndex = (byId("scene").selectedIndex + by + count) % count;
  showScene();
}

setTheme(new URLSearchParams(location.search).get("theme") || "auto");
byId("theme").addEventListener("click", nextTheme);
if (run.scenes.length) {
  fillScenes();
  byId("scene").addEventListener("change", showScene);
  byId("stream").addEventListener("change", () => {
    wantedStream = byId("stream").value;
    paint();
  });
  byId("previous").addEventListener("click", () => moveScene(-1));
  byId("next").addEventListener("click", () => moveScene(1));
  window.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  showScene();
}
drawCharts();

"use strict";
// The token view: the texts of one scene side by side, every token coloured by one stream, all numbers on demand.
// Text of a model enters the page through textContent only.

const run = JSON.parse(document.getElementById("run").textContent);
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- numbers and colours

const FULL_STRENGTH = 62; // percent: the text on the colour stays readable in both themes
const known = (value) => value !== null && value !== undefined;
const scaleOf = (name) => run.scales.find((scale) => scale.name === name);
const neutral = (scale) => (scale.kind === "around_one" ? 1 : 0);

function tone(scale, value) {
  if (scale.kind === "magnitude") return "var(--magnitude)";
  return value < neutral(scale) ? "var(--negative)" : "var(--positive)";
}

function strength(scale, value) {
  if (!scale || !known(value)) return 0;
  return Math.min(1, Math.abs(value - neutral(scale)) / scale.bound) * FULL_STRENGTH;
}

function short(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  const digits = size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return digits.replaceAll("-", "−");
}

const signed = (value) => (known(value) && value > 0 ? `+${short(value)}` : short(value));

// ---- comparing: with the aligned token of the other checkpoint, or with the same place in the rest of the group

const acts = (panel, index) => panel.tokens.action[index] === 1;

function places(panel) {
  panel.places ||= panel.tokens.action.flatMap((action, index) => (action === 1 ? [index] : []));
  return panel.places;
}

// What the number of a token is compared with; null where there is nothing to compare with.
function counterpart(scene, at, index, name) {
  const panel = scene.panels[at];
  if (scene.kind === "pair") {
    const partner = panel.match ? panel.match[index] : -1;
    return partner < 0 ? null : scene.panels[1 - at].streams[name]?.[partner];
  }
  panel.counts ||= panel.tokens.action.map(((n) => (action) => (action === 1 ? n++ : -1))(0));
  const others = scene.panels.filter((other, k) => k !== at && other.streams?.[name]);
  const values = others.map((other) => other.streams[name][places(other)[panel.counts[index]]]).filter(known);
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

function difference(scene, at, index, name) {
  const value = scene.panels[at].streams[name]?.[index];
  const other = counterpart(scene, at, index, name);
  if (!known(value) || !known(other)) return null;
  return scene.kind === "pair" && at === 0 ? other - value : value - other; // of a pair: after − before
}

const canCompare = (scene) => scene.panels.filter((panel) => panel.tokens).length > 1;

// ---- nodes

// What cannot be seen is shown by a sign: control characters by their pictures, the others (among them those that
// turn the direction of what follows) by their number. Joiners stay: scripts and emoji need them. A line may end
// after the sign of a space, as after the space itself.
const UNSEEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visible(piece, marks) {
  const shown = piece.replace(UNSEEN, (c) => {
    const code = c.charCodeAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
  return marks ? shown.replaceAll(" ", "·\u200b").replaceAll("\u00a0", "⍽") : shown;
}

function tokenText(piece, marks) {
  const parts = visible(piece, marks).split("\n");
  return parts.flatMap((part, i) => (i === 0 ? [part] : [element("i", { textContent: "↵" }), "\n" + part]));
}

const findingsAt = (panel, index) => (panel.findings || []).filter((f) => f.start <= index && index < f.stop);

// Letters that join the next one. Between two such a part of a character takes no room: a box would break their shapes.
const JOINING = /^\p{Mn}*(?=[\p{Script=Arabic}\p{Script=Syriac}\p{Script=Nko}\p{Script=Mongolian}])\p{L}/u;
const JOINED = /(?=[\p{Script=Arabic}\p{Script=Syriac}\p{Script=Nko}\p{Script=Mongolian}])\p{L}\p{Mn}*$/u;

function insideWord(pieces, index) {
  const before = pieces.slice(0, index).findLast((piece) => piece !== "") ?? "";
  const after = pieces.slice(index).find((piece) => piece !== "") ?? "";
  return JOINED.test(before) && JOINING.test(after);
}

function tokenNode(panel, index) {
  const piece = panel.tokens.piece[index];
  const node = element("span", { className: "token", tabIndex: -1 });
  node.setAttribute("role", "option");
  node.dataset.index = index;
  if (piece === "") node.setAttribute("aria-label", "part of the next character");
  node.classList.toggle("part", piece === "");
  node.classList.toggle("inside", piece === "" && insideWord(panel.tokens.piece, index));
  node.classList.toggle("given", !acts(panel, index));
  node.classList.toggle("special", /^(<\|?[\w ]+\|?>|<\/s>|\[[A-Z]+\])$/.test(piece));
  node.classList.toggle("found", findingsAt(panel, index).length > 0);
  node.classList.toggle("alone", Boolean(panel.match) && panel.match[index] < 0);
  return node;
}

function tokenList(panel) {
  const nodes = panel.tokens.piece.map((_, index) => tokenNode(panel, index));
  const list = element("div", { className: "text" }, ...nodes);
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-orientation", "horizontal");
  list.setAttribute("aria-label", `${panel.title}: tokens, arrow keys move`);
  if (nodes.length) nodes[0].tabIndex = 0;
  list.addEventListener("keydown", (event) => {
    const target = neighbour(nodes, nodes.indexOf(document.activeElement), event.key);
    if (!target) return;
    event.preventDefault();
    focusToken(target);
  });
  return list;
}

function focusToken(node) {
  for (const other of node.parentElement.children) other.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
}

// Left and right follow the order of the tokens, up and down the lines on the screen.
function neighbour(nodes, at, key) {
  if (at < 0) return null;
  if (key === "ArrowRight") return nodes[at + 1];
  if (key === "ArrowLeft") return nodes[at - 1];
  if (key === "Home") return nodes[0];
  if (key === "End") return nodes[nodes.length - 1];
  if (key !== "ArrowDown" && key !== "ArrowUp") return null;
  const here = nodes[at].getClientRects()[0];
  const down = key === "ArrowDown";
  const others = down ? nodes.slice(at + 1) : nodes.slice(0, at).reverse();
  const boxes = others.map((node) => [node, node.getClientRects()[0]]).filter(([, box]) => box);
  const away = boxes.filter(([, box]) => (down ? box.top > here.top + 4 : box.top < here.top - 4));
  const line = away.filter(([, box]) => Math.abs(box.top - away[0][1].top) < 4);
  line.sort(([, a], [, b]) => Math.abs(a.left - here.left) - Math.abs(b.left - here.left));
  return line.length ? line[0][0] : null;
}

function panelNode(panel) {
  const node = element("article", { className: "panel" }, element("h3", { textContent: panel.title }));
  node.dataset.id = panel.id;
  node.append(element("p", { className: "about", textContent: panel.facts.join(" · ") }));
  node.append(panel.tokens ? tokenList(panel) : element("div", { className: "text", dir: "auto", textContent: panel.text }));
  if (panel.tokens) node.append(element("p", { className: "about sum" }));
  return node;
}

function fold(title, text) {
  return element(
    "details",
    {},
    element("summary", { textContent: title }),
    element("div", { className: "prompt", dir: "auto", textContent: visible(text) }),
  );
}

const quoted = (text) => element("bdi", { className: "prompt", textContent: visible(text) });

// Which parts of the reward changed between the two texts of a pair, the largest change first.
function earnedNode(scene) {
  const [before, after] = scene.panels;
  if (scene.kind !== "pair" || !before.tokens || !after.tokens || !after.streams["reward/total"]) return [];
  const sum = (panel, name) =>
    (panel.streams[name] || []).reduce((all, value, index) => all + (acts(panel, index) ? value || 0 : 0), 0);
  const moved = (name) => sum(after, name) - sum(before, name);
  const parts = Object.keys(after.streams).filter((name) => name.startsWith("reward/") && name !== "reward/total");
  parts.sort((a, b) => Math.abs(moved(b)) - Math.abs(moved(a)));
  const text = parts.map((name) => `${name.slice("reward/".length)} ${signed(moved(name))}`).join(", ");
  const total = "reward/total";
  const whole = `${short(sum(before, total))} → ${short(sum(after, total))} (${signed(moved(total))})`;
  const why = parts.length > 1 ? `, by its parts: ${text}` : "";
  return [element("p", { className: "answer earned", textContent: `Reward ${whole}${why}` })];
}

function sceneNodes(scene) {
  const nodes = [element("h3", { textContent: scene.title })];
  if (scene.prompt) nodes.push(fold("Prompt", scene.prompt));
  if (scene.answer.length > 400) nodes.push(fold("Reference answer", scene.answer));
  else if (scene.answer) nodes.push(element("p", { className: "answer" }, "Reference answer ", quoted(scene.answer)));
  return [...nodes, ...earnedNode(scene), element("div", { className: "panels" }, ...scene.panels.map(panelNode))];
}

// ---- painting: the text itself stays, so focus and reading place are kept

function paint(scene, view) {
  const scale = scaleOf(view.stream);
  const shown = view.against && scale ? { ...scale, kind: "signed" } : scale;
  document.querySelectorAll("#scene .panel").forEach((node, at) => {
    const panel = scene.panels[at];
    if (!panel.tokens) return;
    const values = panel.tokens.action.map((action, index) => {
      if (action !== 1 || !scale) return null;
      return view.against ? difference(scene, at, index, scale.name) : panel.streams[scale.name]?.[index];
    });
    node.querySelectorAll(".token").forEach((token, t) => {
      token.style.setProperty("--strength", `${strength(shown, values[t])}%`);
      if (shown) token.style.setProperty("--tone", tone(shown, values[t]));
    });
    node.querySelector(".sum").textContent = summary(scale, values, view);
  });
  showLegend(shown, scene, view);
}

function write(scene, marks) {
  byId("scene").classList.toggle("marks", marks);
  document.querySelectorAll("#scene .panel").forEach((node, at) => {
    const text = node.querySelector(".text");
    text.removeAttribute("dir"); // else the browser looks through the whole text again for each token
    node.querySelectorAll(".token").forEach((token, t) => {
      token.replaceChildren(...tokenText(scene.panels[at].tokens.piece[t], marks));
    });
    text.dir = "auto";
  });
}

function summary(scale, values, view) {
  const found = values.filter(known);
  if (!scale || !found.length) return "";
  const sum = found.reduce((a, b) => a + b, 0);
  const total = scale.name.startsWith("reward/") && !view.against;
  const text = total ? `sum ${short(sum)}` : `mean ${view.against ? signed(sum / found.length) : short(sum / found.length)}`;
  return `${scale.label}${view.against ? ", difference" : ""}: ${text} over ${found.length} tokens`;
}

function showLegend(scale, scene, view) {
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
  const words = [view.against ? COMPARED[scene.kind].legend : "", scale.meaning].filter(Boolean).join(" ");
  const notes = [element("span", { textContent: words })];
  if (scene.kind === "pair" && scale.name === "kl" && run.reference_is_before && !view.against) {
    const exact = "The reference is the model before: in the text after, this is log-prob after − before at every token.";
    notes.push(element("span", { textContent: exact }));
  }
  if (scene.kind === "pair") notes.push(element("span", { className: "alone", textContent: "underlined: not in the other text" }));
  if (scene.panels.some((panel) => panel.tokens?.action.includes(0))) {
    notes.push(element("span", { className: "given", textContent: "slanted: given, not chosen by the model" }));
  }
  if (scene.panels.some((panel) => panel.findings)) {
    notes.push(element("span", { className: "found", textContent: "wavy: a reward found something, point at it" }));
  }
  return byId("legend").replaceChildren(ends[0], bar, ends[1], ...notes);
}

const COMPARED = {
  pair: {
    label: "After − before",
    column: "other text",
    legend: "After − before at tokens that both texts have; up to the first underlined one also after the same words.",
  },
  group: {
    label: "Minus the others at this place",
    column: "others here",
    legend: "This completion − mean of the others of its group at the same place.",
  },
};

// ---- the numbers of one token

function showTip(node, scene, at, view) {
  const panel = scene.panels[at];
  const index = Number(node.dataset.index);
  const chosen = acts(panel, index);
  const piece = visible(panel.tokens.piece[index]).replaceAll("\n", "↵");
  const compare = chosen && canCompare(scene);
  const rows = run.scales
    .filter((scale) => chosen && scale.name in panel.streams)
    .map((scale) => {
      const value = panel.streams[scale.name][index];
      const share = scale.name.endsWith("logprob") && known(value) ? ` (${percent(value)})` : "";
      const row = element("tr", {}, element("th", { scope: "row", textContent: scale.label }));
      row.append(element("td", { textContent: short(value) + share }));
      if (compare) row.append(element("td", { textContent: short(counterpart(scene, at, index, scale.name)) }));
      if (scale.name === view.stream) row.className = "chosen";
      return row;
    });
  const head = compare
    ? [element("tr", { className: "head" }, element("td"), element("td", { textContent: "this" }), element("td", { textContent: COMPARED[scene.kind].column }))]
    : [];
  const messages = findingsAt(panel, index).map((found) => {
    const tokens = found.stop - found.start;
    const where = tokens > 1 ? ` for ${tokens} tokens together` : "";
    const text = `${found.part} ${signed(found.value)}${where}: ${visible(found.message)}`;
    return element("p", { className: "finding", textContent: text });
  });
  const id = known(panel.tokens.id?.[index]) ? `, id ${panel.tokens.id[index]}` : "";
  const about = `token ${index + 1} of ${panel.tokens.piece.length}${id}`;
  const tip = byId("tip");
  tip.replaceChildren(
    element("b", { textContent: piece === "" ? "part of the next character" : `“${piece}”`, dir: "auto" }),
    element("div", { textContent: chosen ? about : `${about}, not chosen by the model` }),
    ...messages,
    ...alternativesAt(panel, index),
    element("table", {}, ...head, ...rows),
  );
  tip.hidden = false;
  placeTip(tip, node.getClientRects()[0]);
  node.setAttribute("aria-describedby", "tip");
}

// What else could have stood at a token: as a model was asked in the studio, else as it was written down.
function choicesAt(panel, index) {
  if (panel.choices) return panel.choices[index];
  const kept = panel.alternatives;
  if (!kept?.id[index].length) return null;
  const others = kept.id[index].map((token, k) => ({
    token,
    piece: kept.piece[token] ?? `id ${token}`,
    logprob: kept.logprob[index][k],
  }));
  return { chosen: { token: panel.tokens.id[index] }, rank: kept.rank[index], others };
}

function alternativesAt(panel, index) {
  const place = choicesAt(panel, index);
  if (!place) return [];
  const rows = place.others.slice(0, 6).map((other) => {
    const head = element("th", { scope: "row", textContent: inQuotes(other.piece), dir: "auto" });
    const row = element("tr", { className: "other" }, head);
    row.append(element("td", { textContent: percent(other.logprob) }));
    row.classList.toggle("chosen", other.token === place.chosen.token);
    return row;
  });
  const title = `Most probable here (this one is number ${place.rank})`;
  return [element("div", { textContent: title }), element("table", {}, ...rows)];
}

function inQuotes(piece) {
  return piece === "" ? "part of a character" : `“${visible(piece).replaceAll("\n", "↵")}”`;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.01 ? `${Number(share.toPrecision(2))}%` : "<0.01%";
}

function placeTip(tip, box) {
  const [room, height] = [document.documentElement.clientWidth - tip.offsetWidth - 12, tip.offsetHeight];
  const beside = box.right + 12 <= room ? box.right + 12 : box.left - 12 - tip.offsetWidth;
  let [left, top] = [Math.max(12, Math.min(box.left, room)), box.bottom + 8];
  if (top + height > window.innerHeight) top = box.top - 8 - height;
  if (top < 0 && beside >= 12) [left, top] = [beside, Math.max(8, window.innerHeight - 8 - height)]; // neither below nor above
  else if (top < 0) top = box.bottom + 8;
  tip.style.left = `${window.scrollX + left}px`;
  tip.style.top = `${window.scrollY + top}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

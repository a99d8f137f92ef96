// The list of all samples: orders, search, and links. Only the rows in sight are in the page, however many there are.

const ROW_HEIGHT = 44;
const view = { id: null, stream: "advantage", against: false, marks: false, token: null };
const homes = new Map(); // id of a text -> key of the scene that shows it
let order = null;
let found = []; // rows of the chosen list, in order

// A page from disk holds what it can show. One that is served holds a part, and has a server to ask.
let askScene = null; // async (id of a text): its scene comes into `run.scenes` and `homes`
let askWords = null; // async (words): the ids of the samples that have them
let having = null; // that answer

// ---- which samples

function rowsOf(name) {
  const columns = run.lists[name];
  return columns.id ? columns.id.map((_, i) => i) : [];
}

function sortRows() {
  const columns = run.lists[order.list];
  const values = columns[order.column];
  const words = searched();
  const fits = (row) => !words || (having ? having.has(columns.id[row]) : haystack(columns, row).includes(words));
  found = rowsOf(order.list).filter((row) => known(values[row]) && fits(row));
  const sign = order.descending ? -1 : 1;
  const named = (row) => (words && columns.title[row].toLowerCase() === words ? 1 : 0); // what is meant comes first
  found.sort((a, b) => named(b) - named(a) || sign * (values[a] - values[b]) || a - b);
  const shown = found.filter((row) => columns.scene[row] !== null).length;
  const here = shown === found.length ? "" : `, ${shown} with their tokens in this page`;
  const what = order.list === "held_out" ? `, ${run.gain_of} before → after` : "";
  const which = order.list === "held_out" ? "held-out item" : "training sample";
  if (words && !found.length) byId("count").textContent = `No ${which} has these words.`;
  else byId("count").textContent = `${found.length} ${found.length === 1 ? "sample" : "samples"}${here}${what}`;
}

const searched = () => byId("search").value.trim().toLowerCase();

async function search() {
  const words = searched();
  if (askWords && words) {
    await new Promise((resolve) => setTimeout(resolve, 200)); // until the words are written
    if (words !== searched()) return;
    byId("count").textContent = "Searching …";
    let answer = new Set();
    let problem = "";
    try {
      answer = await askWords(words);
    } catch (error) {
      problem = error.message;
    }
    if (words !== searched()) return;
    having = answer;
    sortRows();
    if (problem) byId("count").textContent = problem;
  } else {
    having = null;
    sortRows();
  }
  byId("list").scrollTop = 0;
  drawRows();
  if (found.length && !found.some(isCurrent)) openSample(run.lists[order.list].id[found[0]]);
}

const haystacks = new Map();

function haystack(columns, row) {
  const id = columns.id[row];
  if (!haystacks.has(id)) haystacks.set(id, searchText(columns, row).toLowerCase());
  return haystacks.get(id);
}

function searchText(columns, row) {
  const scene = run.scenes[columns.scene[row]];
  if (!scene) return columns.title[row];
  const panels = scene.kind === "pair" ? scene.panels : scene.panels.filter((panel) => panel.id === columns.id[row]);
  const texts = panels.map((panel) => (panel.tokens ? panel.tokens.piece.join("") : panel.text));
  return [columns.title[row], scene.prompt, scene.answer, ...texts].join("\n");
}

// A row of the list and a text of a scene may be two views of one held-out item.
function isCurrent(row) {
  const columns = run.lists[order.list];
  return columns.id[row] === view.id || (order.list === "held_out" && columns.scene[row] === homes.get(view.id));
}

// ---- the list

function fillOrders() {
  const names = { held_out: "Held-out items, before and after", training: "Training samples" };
  for (const [list, name] of Object.entries(names)) {
    const options = run.orders.flatMap((candidate, i) =>
      candidate.list === list ? [element("option", { value: i, textContent: candidate.label })] : [],
    );
    if (options.length) byId("order").append(element("optgroup", { label: name }, ...options));
  }
}

function findHomes() {
  homes.clear();
  haystacks.clear();
  for (const [key, scene] of Object.entries(run.scenes)) scene.panels.forEach((panel) => homes.set(panel.id, key));
}

function chooseOrder(index) {
  order = run.orders[index];
  byId("order").value = String(index);
  sortRows();
  byId("list").scrollTop = 0;
  drawRows();
}

function drawRows() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const count = Math.ceil(list.clientHeight / ROW_HEIGHT) + 8;
  byId("rows").style.height = `${found.length * ROW_HEIGHT}px`;
  byId("rows").replaceChildren(...found.slice(first, first + count).map((row, i) => rowNode(row, first + i)));
  const current = found.findIndex(isCurrent);
  if (current >= first && current < first + count) list.setAttribute("aria-activedescendant", `row-${current}`);
  else list.removeAttribute("aria-activedescendant");
}

function rowNode(row, place) {
  const columns = run.lists[order.list];
  const node = element("div", { id: `row-${place}`, className: "row" });
  node.append(element("span", { className: "name", textContent: columns.title[row] }));
  node.append(element("small", { textContent: rowFacts(columns, row) }));
  node.classList.toggle("absent", columns.scene[row] === null);
  node.style.top = `${place * ROW_HEIGHT}px`;
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", String(isCurrent(row)));
  node.setAttribute("aria-setsize", found.length);
  node.setAttribute("aria-posinset", place + 1);
  node.addEventListener("click", () => openSample(columns.id[row]));
  return node;
}

const FACTS = { clipped: "clipped", value_error: "value error", disagreement: "disagreement", kl: "KL", tokens: "tokens" };

function rowFacts(columns, row) {
  if (order.list === "held_out") {
    return `${short(columns.before[row])} → ${short(columns.after[row])} (${signed(columns.gain[row])})`;
  }
  const name = order.column in FACTS ? order.column : "tokens";
  const value = columns[name][row];
  const shown = name === "clipped" ? `${Math.round(100 * value)}%` : short(value);
  return `step ${columns.id[row]} · reward ${short(columns.reward[row])} · ${FACTS[name]} ${shown}`;
}

function moveInList(event) {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || !found.length) return;
  event.preventDefault();
  const columns = run.lists[order.list];
  const at = found.findIndex(isCurrent);
  const to = Math.min(found.length - 1, Math.max(0, at + steps[event.key]));
  openSample(columns.id[found[to]]);
  keepInSight(to);
}

function keepInSight(place) {
  const list = byId("list");
  const top = place * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
  drawRows();
}

// ---- one sample

const currentScene = () => run.scenes[homes.get(view.id)];

function openSample(id) {
  view.id = id;
  view.token = null;
  showScene();
  drawRows();
  remember();
}

function showScene() {
  hideTip();
  const scene = currentScene();
  document.querySelector(".reader .controls").hidden = !scene;
  if (!scene) {
    if (askScene) bringing = bringScene(view.id);
    else byId("scene").replaceChildren(absent());
    return;
  }
  byId("scene").style.minHeight = "";
  byId("scene").replaceChildren(...sceneNodes(scene));
  fillStreams(scene);
  const comparable = canCompare(scene);
  byId("against-label").hidden = !comparable;
  byId("against-text").textContent = comparable ? COMPARED[scene.kind].label : "";
  write(scene, view.marks);
  repaint();
}

let bringing = Promise.resolve(); // the scene that is on its way

async function bringScene(id) {
  const place = byId("scene");
  place.style.minHeight = `${place.offsetHeight}px`; // the page below stays where it is
  place.replaceChildren(element("p", { textContent: "The texts are on their way …" }));
  try {
    await askScene(id);
    if (id === view.id) showScene();
    drawRows();
  } catch (error) {
    if (id === view.id) place.replaceChildren(element("p", { textContent: error.message }));
  }
}

function absent() {
  const columns = run.lists[order.list];
  const row = columns.id.indexOf(view.id);
  const [step, sample] = String(view.id).split(".");
  const which = order.list === "training" ? `--step ${step} --sample ${sample}` : `--item '${columns.title[row]}'`;
  const command = `pertoken show ${run.folder} ${which}`;
  return element(
    "p",
    {},
    "The tokens of this sample are not in this page, to keep it small. The run folder has them: ",
    element("code", { textContent: command }),
  );
}

function repaint() {
  const scene = currentScene();
  if (!scene) return;
  paint(scene, { ...view, stream: byId("stream").value, against: view.against && canCompare(scene) });
  const own = (node) => scene.kind === "group" && node.dataset.id === view.id;
  document.querySelectorAll("#scene .panel").forEach((node) => node.classList.toggle("picked", own(node)));
}

// Offers the streams that this scene has, and stays with the reader's choice where it can.
function fillStreams(scene) {
  const coloured = run.scales.filter((scale) => !scale.flat);
  const here = coloured.filter((scale) => scene.panels.some((panel) => scale.name in (panel.streams || {})));
  byId("stream").replaceChildren(...here.map((scale) => element("option", { value: scale.name, textContent: scale.label })));
  const wish = [view.stream, "advantage", "reward/total"].find((name) => here.some((scale) => scale.name === name));
  if (wish) byId("stream").value = wish;
}

function placeOf(node) {
  const panel = node.closest(".panel");
  return [...panel.parentElement.children].indexOf(panel);
}

function tokenAt(event) {
  const node = event.target.closest?.(".token");
  return node && byId("scene").contains(node) ? node : null;
}

function tip(node) {
  showTip(node, currentScene(), placeOf(node), { ...view, stream: byId("stream").value });
}

// ---- links: the address always says what is on the screen

function remember() {
  const state = new URLSearchParams({ sample: view.id, by: byId("stream").value || view.stream });
  if (view.token !== null) state.set("token", view.token);
  if (view.against) state.set("against", "1");
  if (view.marks) state.set("marks", "1");
  byId("link").href = `#${state}`;
  history.replaceState(null, "", `#${state}`);
}

// The list that a text belongs to: that of held-out items has the key of the scene, and the id of one text of two.
function listOf(id) {
  const list = Object.keys(run.lists).find((name) => (run.lists[name].id || []).includes(id));
  if (list) return list;
  const key = homes.get(id) || String(id).replace(/\.\d+(?=\.\d+$)/, "");
  return (run.lists.held_out.scene || []).includes(key) ? "held_out" : null;
}

// Shows what the address asks for; false if it asks for nothing that is here.
function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  const id = state.get("sample");
  const list = listOf(id);
  if (!list) return false;
  Object.assign(view, { id, stream: state.get("by") || view.stream });
  Object.assign(view, { against: state.has("against"), marks: state.has("marks"), token: null });
  byId("against").checked = view.against;
  byId("marks").checked = view.marks;
  if (!order || order.list !== list) chooseOrder(run.orders.findIndex((candidate) => candidate.list === list));
  showScene();
  keepInSight(Math.max(0, found.findIndex(isCurrent)));
  byId("tokens").scrollIntoView();
  const focus = () => {
    const tokens = document.querySelectorAll(`#scene .panel[data-id="${CSS.escape(id)}"] .token`);
    const token = tokens[Number(state.get("token")) - 1];
    if (token) focusToken(token);
  };
  if (currentScene()) focus();
  else bringing.then(() => id === view.id && focus());
  return true;
}

// ---- start

function startBrowser() {
  findHomes();
  fillOrders();
  byId("order").addEventListener("change", () => {
    chooseOrder(Number(byId("order").value));
    if (found.length) openSample(run.lists[order.list].id[found[0]]);
  });
  byId("search").addEventListener("input", search);
  byId("list").addEventListener("scroll", drawRows, { passive: true });
  byId("list").addEventListener("keydown", moveInList);
  listenToScene();
  window.addEventListener("hashchange", restore);
  if (restore()) return;
  chooseOrder(0);
  view.id = run.lists[order.list].id[found[0]];
  showScene();
  drawRows();
}

// The controls above the texts, and the tokens themselves.
function listenToScene() {
  byId("stream").addEventListener("change", () => {
    view.stream = byId("stream").value;
    repaint();
    remember();
  });
  for (const name of ["against", "marks"]) {
    byId(name).addEventListener("change", () => {
      view[name] = byId(name).checked;
      if (name === "marks") write(currentScene(), view.marks);
      repaint();
      remember();
    });
  }
  const scene = byId("scene");
  scene.addEventListener("mouseover", (event) => (tokenAt(event) ? tip(tokenAt(event)) : hideTip()));
  scene.addEventListener("mouseleave", hideTip);
  scene.addEventListener("focusout", hideTip);
  scene.addEventListener("focusin", (event) => {
    const node = tokenAt(event);
    if (!node) return;
    view.id = node.closest(".panel").dataset.id;
    view.token = Number(node.dataset.index) + 1;
    remember();
    tip(node);
  });
  window.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}

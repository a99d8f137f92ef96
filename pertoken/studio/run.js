// The page of a run while it goes on, and questions to its models.

const here = pathOf(studio.run);

// ---- following the run

function follow() {
  showStatus();
  const look = async () => await apply(await call(`/live/${here}?metrics=${studio.metrics}&samples=${studio.samples}`));
  watch(look, () => (studio.status === "running" ? 3 : 10));
}

async function apply(now) {
  Object.assign(studio, { status: now.status, metrics: now.metrics, samples: now.samples });
  showStatus();
  if (!now.page) return;
  const samples = now.page.orders.length > 0;
  if (samples && !run.orders.length) return location.reload(); // the first ones: now there is something to browse
  const current = samples ? await currentIn(now.page) : null;
  document.querySelector(".facts").outerHTML = now.summary; // made and escaped by the server, as the page itself
  run.charts = now.page.charts;
  for (const [id, html] of Object.entries(now.sections)) renew(byId(id), html);
  if (samples) renewSamples(now.page, current);
  if (window.Plotly) drawCharts();
}

// New figures for a section. Charts that are there already get their new curves and stay where they are.
function renew(section, html) {
  const fresh = element("div");
  fresh.innerHTML = html;
  const named = (place) => place.getAttribute("aria-label");
  const drawn = new Map([...section.querySelectorAll(".js-plotly-plot")].map((place) => [named(place), place]));
  const kept = [...fresh.querySelectorAll(".plot")].filter((place) => drawn.has(named(place)));
  for (const place of kept) {
    const plot = drawn.get(named(place));
    plot.dataset.chart = place.dataset.chart;
    place.replaceWith(plot);
  }
  const open = new Set([...section.querySelectorAll("details[open] > summary")].map((node) => node.textContent));
  for (const node of fresh.querySelectorAll("details > summary")) node.parentElement.open = open.has(node.textContent);
  section.replaceChildren(section.querySelector("h2"), ...fresh.childNodes);
  for (const plot of section.querySelectorAll(".js-plotly-plot")) {
    const { data, layout } = run.charts[Number(plot.dataset.chart)];
    Plotly.react(plot, data, layout, PLOT_OPTIONS);
  }
}

// ---- texts that are not in the page, and words in them

const MOST_SCENES = 30; // so many are kept in the page; older ones are asked for again
const brought = []; // their keys

const sceneOf = (id) => call(`/scene/${here}?sample=${encodeURIComponent(id)}`);

askScene = async (id) => {
  const { key, scene, scales } = await sceneOf(id);
  run.scenes[key] = scene;
  brought.push(key);
  for (const old of brought.splice(0, brought.length - MOST_SCENES)) if (!brought.includes(old)) delete run.scenes[old];
  findHomes();
  adopt(scene, scales);
};

askWords = async (words) => new Set((await call(`/find/${here}?words=${encodeURIComponent(words)}`)).ids);

// A scene gets its scales, and the answers that its texts have got before.
function adopt(scene, scales) {
  const better = (scale) => !scaleOf(scale.name) || (scaleOf(scale.name).flat && !scale.flat);
  for (const scale of scales.filter(better)) run.scales = [...run.scales.filter((other) => other.name !== scale.name), scale];
  for (const panel of scene.panels) if (answered.has(panel.id)) keepAnswers(answered.get(panel.id));
}

// ---- new samples

// What is being read, if the new page does not have it by itself.
async function currentIn(page) {
  const key = homes.get(view.id);
  if (!key || page.scenes[key]) return null;
  const { id, scene } = page.lists.held_out;
  const at = (scene || []).indexOf(key);
  try {
    return await sceneOf(at < 0 ? view.id : id[at]);
  } catch {
    return null; // it is gone
  }
}

// New samples come into the list; what is being read stays, with the answers that it got.
function renewSamples(page, current) {
  const key = homes.get(view.id);
  const before = run.scenes[key];
  const at = before ? before.panels.findIndex((panel) => panel.id === view.id) : -1;
  const { list, column } = order;
  const top = byId("list").scrollTop;
  for (const name of ["lists", "orders", "scenes", "scales", "reference_is_before", "gain_of"]) run[name] = page[name];
  brought.length = 0;
  if (current) {
    run.scenes[current.key] = current.scene;
    brought.push(current.key);
  }
  findHomes();
  for (const scene of Object.values(run.scenes)) adopt(scene, current?.scene === scene ? current.scales : []);
  if (!homes.has(view.id) && at >= 0 && run.scenes[key]) view.id = run.scenes[key].panels[at].id;
  byId("order").replaceChildren();
  fillOrders();
  chooseOrder(Math.max(0, run.orders.findIndex((other) => other.list === list && other.column === column)));
  byId("list").scrollTop = top;
  drawRows();
  if (searched()) search();
  if (said(currentScene()) === said(before)) repaint();
  else showScene();
  fillModels();
}

// What a scene says, to be compared.
function said(scene) {
  return JSON.stringify(scene?.panels.map((panel) => [panel.id, panel.facts, panel.tokens?.id || panel.text]));
}

const answered = new Map(); // id of a text -> the panel that has its answers

function keepAnswers(panel) {
  const now = run.scenes[homes.get(panel.id)]?.panels.find((other) => other.id === panel.id);
  if (now?.tokens?.id.join() !== panel.tokens.id.join()) return;
  if (now === panel) return;
  answered.set(now.id, now);
  now.choices = panel.choices;
  now.asked = panel.asked;
  for (const [name, scale] of Object.entries(panel.asked)) {
    now.streams[name] = panel.streams[name];
    if (!scaleOf(name)) run.scales.push(scale);
  }
}

function showStatus() {
  let place = byId("status");
  if (!place) {
    place = element("p", { id: "status" });
    document.querySelector("nav").before(place);
  }
  if (place.dataset.status === studio.status) return;
  place.dataset.status = studio.status;
  const answer = element("span");
  answer.setAttribute("role", "status");
  const act = (path) => async () => {
    try {
      answer.textContent = (await call(`/${path}/${here}`, {})).said;
    } catch (error) {
      answer.textContent = error.message;
    }
  };
  const word = element("strong", { className: `status ${studio.status}`, textContent: studio.status });
  const buttons = [];
  if (studio.status === "running") buttons.push(button("Stop", act("stop")));
  if (["interrupted", "killed", "failed"].includes(studio.status)) buttons.push(button("Resume", act("resume")));
  place.replaceChildren(word, ...buttons, answer);
}

// ---- questions to the models

const ask = {};

function offerQuestions() {
  ask.model = choice([], "");
  ask.against = choice([], "");
  ask.against.setAttribute("aria-label", "Difference to the model");
  ask.said = element("p", { id: "asked" });
  ask.said.setAttribute("role", "status");
  ask.place = element("div", { id: "place" });
  ask.answer = element("div", { id: "answer" });
  const controls = element(
    "div",
    { className: "asking" },
    labelled("Model", ask.model),
    button("What else could stand here", askAlternatives),
    button("Which tokens caused the score", askCauses),
    button("Gradients of the reward", askGradients("reward")),
    button("Gradients of the log-prob", askGradients("policy")),
    element("span", {}, button("Difference to", askDifference), " ", ask.against),
  );
  const heading = element("h3", { textContent: "Ask the model" });
  const node = element("div", { id: "ask" }, heading, controls, ask.said, ask.place, ask.answer);
  node.setAttribute("role", "region");
  node.setAttribute("aria-label", "Questions to the model");
  document.querySelector(".reader").append(node);
  byId("scene").addEventListener("focusin", (event) => tokenAt(event) && showPlace());
  showPlace();
  bringing.then(showPlace); // a link may lead to a text that is still on its way
  fillModels();
}

const saying = (act) => async (...parameters) => {
  try {
    await act(...parameters);
  } catch (error) {
    ask.said.textContent = error.message;
  }
};

const fillModels = saying(async () => {
  const { models } = await call(`/models/${here}`);
  for (const [node, wish] of [[ask.model, models[models.length - 1]], [ask.against, models[0]]]) {
    const chosen = models.includes(node.value) ? node.value : wish;
    node.replaceChildren(...choice(models, chosen).childNodes);
    node.value = chosen;
  }
});

// The text that is asked about: the one with the chosen token, else the one that was opened.
function asked() {
  const panel = currentScene()?.panels.find((candidate) => candidate.id === view.id);
  return panel?.tokens ? panel : null;
}

async function question(name, more = {}, panel = asked()) {
  if (!panel) throw new Error("The tokens of this sample are not in this page.");
  ask.said.textContent = "The model is asked …";
  const body = { question: name, sample: panel.id, model: ask.model.value || null, ...more };
  const { answer } = await call(`/ask/${here}`, body);
  ask.said.textContent = "";
  return { panel, answer };
}

const askAlternatives = saying(async () => {
  const { panel, answer } = await question("alternatives");
  const at = places(panel);
  panel.choices = panel.tokens.piece.map((_, index) => answer[at.indexOf(index)] || null);
  const own = answer.map((place) => place.chosen.logprob);
  addStream(panel, `log-prob of ${ask.model.value}`, own, "Under the model that was asked.");
  showPlace();
});

const askCauses = saying(async () => {
  const { panel, answer } = await question("causes");
  const { total, ...parts } = answer.parts;
  const shown = Object.keys(parts).length > 1 ? { total, ...parts } : { total };
  for (const [part, values] of Object.entries(shown)) {
    addStream(panel, `caused: ${part}`, values, "What the text loses of its reward without the token.");
  }
  choose("caused: total");
  ask.said.textContent = answer.notes.join(" ");
});

// Of a policy: the log-prob of the chosen token, or of the whole text; the prompt is read too, and shown below.
function askGradients(of) {
  return saying(async () => {
    const shown = asked();
    const token = shown && of === "policy" && view.token !== null ? places(shown).indexOf(view.token - 1) : -1;
    const { panel, answer } = await question("attributions", { of, token: token < 0 ? null : token });
    const told = [];
    for (const [name, { values, score, neutral }] of Object.entries(answer.scores)) {
      const text = values.slice(answer.prompt).filter((_, k) => acts(panel, k));
      const stream = `adds to: ${name}`;
      addStream(panel, stream, text, "By the gradient of what the model reads, against neutral tokens.", values);
      told.push(
        element("h4", { textContent: `${name}: ${short(score)}, and ${short(neutral)} with neutral tokens instead` }),
        ...(answer.prompt ? [readText(answer.pieces.slice(0, answer.prompt), values, scaleOf(stream))] : []),
      );
    }
    ask.answer.replaceChildren(...told);
    choose(`adds to: ${Object.keys(answer.scores)[0]}`);
    ask.said.textContent = answer.notes.join(" ");
  });
}

// Tokens outside of the view of tokens, in its colours.
function readText(pieces, values, scale) {
  const nodes = pieces.map((piece, k) => {
    const node = element("span", { className: "token", title: signed(values[k]), textContent: visible(piece) });
    node.style.setProperty("--strength", `${strength(scale, values[k])}%`);
    node.style.setProperty("--tone", tone(scale, values[k]));
    return node;
  });
  return element("div", { className: "text read", dir: "auto" }, ...nodes);
}

const askDifference = saying(async () => {
  const { panel, answer } = await question("difference", { against: ask.against.value });
  const name = `log-prob, ${ask.model.value} − ${ask.against.value}`;
  addStream(panel, name, answer, "The same text under two models.");
  choose(name);
});

// Numbers that the run did not keep, shown as those that it did.
function addStream(panel, name, values, meaning, measured = values) {
  const sizes = measured.filter(known).map(Math.abs).sort((a, b) => a - b);
  const bound = Number((sizes[Math.floor(0.95 * (sizes.length - 1))] || 1).toPrecision(2));
  const scale = { name, label: name, meaning, kind: "signed", bound };
  const at = places(panel);
  panel.streams[name] = panel.tokens.piece.map((_, index) => values[at.indexOf(index)] ?? null);
  panel.asked = { ...panel.asked, [name]: scale };
  answered.set(panel.id, panel);
  run.scales = [...run.scales.filter((other) => other.name !== name), scale];
  fillStreams(currentScene());
  repaint();
}

function choose(name) {
  view.stream = name;
  fillStreams(currentScene());
  repaint();
  remember();
}

// ---- one token: its alternatives, and what if

function showPlace() {
  const panel = asked();
  const token = panel && view.token !== null ? places(panel).indexOf(view.token - 1) : -1;
  if (token < 0) {
    const hint = "Choose a token of the text to ask what if it had been another one.";
    return ask.place.replaceChildren(element("p", { textContent: hint }));
  }
  const place = choicesAt(panel, view.token - 1);
  const text = field("text", "", { maxLength: 200, placeholder: "another text, with its spaces" });
  const samples = field("number", 8, { min: 0, max: 64 });
  const seed = field("number", 0, { min: 0 });
  const send = (instead) =>
    askWhatIf(panel, token, { ...instead, samples: Number(samples.value), seed: Number(seed.value) });
  const others = place ? place.others.map((other) => alternative(other, place, send)) : [];
  const title = `If token ${view.token}, ${inQuotes(panel.tokens.piece[view.token - 1])}, had been …`;
  const form = element(
    "form",
    { className: "asking" },
    labelled("Text", text),
    labelled("Samples", samples),
    labelled("Seed", seed),
    element("button", { textContent: "What if" }),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send({ text: text.value });
  });
  ask.place.replaceChildren(
    element("h4", { textContent: title }),
    element("p", { className: "others" }, ...others),
    form,
  );
}

function alternative(other, place, send) {
  const node = button(`${inQuotes(other.piece)} ${percent(other.logprob)}`, () => send({ ids: [other.token] }));
  node.disabled = other.token === place.chosen.token;
  node.dir = "auto";
  return node;
}

const askWhatIf = saying(async (panel, token, wish) => {
  const { answer } = await question("what_if", { token, ...wish }, panel);
  const { was, would_be: instead } = answer;
  const longer = instead.pieces.length - was.pieces.length;
  const rest = longer < 0 ? Infinity : token + 1; // an end in the middle leaves nothing behind it
  const behind = was.logprobs.map((logprob, k) => (k < rest ? null : instead.logprobs[k + longer] - logprob));
  if (behind.some(known)) {
    addStream(panel, "log-prob if it were", behind, "Of what follows: with the other token − as it is.");
  }
  const old = inQuotes(was.pieces[token]);
  const now = inQuotes(instead.pieces.slice(token, longer < 0 ? undefined : token + 1 + longer).join(""));
  const notes = answer.notes.map((note) => element("p", { className: "about", textContent: note }));
  const columns = [[`Sampled on behind ${old}`, answer.onward], [`Sampled on behind ${now}`, answer.onward_instead]];
  ask.answer.replaceChildren(
    element("h4", { textContent: `${now} in the place of ${old}` }),
    element("p", { textContent: effectOf(answer, old, now) }),
    ...notes,
    element("div", { className: "beside" }, ...columns.map(([title, texts]) => rolledNode(title, texts))),
  );
});

function effectOf(answer, old, now) {
  const pays = (text) => (text.paid ? short(text.paid.total) : "unknown");
  const same = `The same text with it: reward ${pays(answer.would_be)}, was ${pays(answer.was)}.`;
  if (!answer.effect) return same;
  const { mean, low, high } = answer.effect;
  const doubt = low > 0 || high < 0 ? "" : ", which may be chance";
  const count = answer.onward.length;
  const interval = `95% interval ${signed(low)} to ${signed(high)}${doubt}`;
  return `${same} Sampled on, ${count} texts behind ${now} earn ${signed(mean)} against ${count} behind ${old} (${interval}).`;
}

function rolledNode(title, texts) {
  const rows = texts.map((text) => {
    const part = (from, to) => visible(text.pieces.slice(from, to).join(""));
    const given = element("span", { className: "given", textContent: part(0, text.begun) });
    const body = element("div", { className: "text", dir: "auto" }, given, part(text.begun));
    const paid = text.paid ? `reward ${short(text.paid.total)} · ` : "";
    const nats = text.logprobs.slice(text.begun).reduce((sum, logprob) => sum + logprob, 0);
    return element("li", {}, body, element("small", { textContent: `${paid}log-prob ${short(nats)} · stopped by ${text.stop}` }));
  });
  return element("article", {}, element("h5", { textContent: title }), element("ol", {}, ...rows));
}

follow();
if (run.orders.length) offerQuestions();

// The playground: two models answer a prompt, token by token.

let going = null; // ends the answers on their way

async function modelsOf() {
  try {
    const { models } = await call(`/models/${pathOf(byId("run-name").value)}`);
    for (const [id, wish] of [["left", models[0]], ["right", models[models.length - 1]]]) {
      byId(id).replaceChildren(...choice(models, wish).childNodes);
      byId(id).value = wish;
    }
  } catch (error) {
    byId("said").textContent = error.message;
  }
}

const number = (id) => Number(byId(id).value);

function wish() {
  return {
    prompt: byId("prompt").value,
    chat: byId("chat").checked,
    seed: number("seed"),
    sampling: {
      temperature: number("temperature"),
      top_p: number("top-p"),
      top_k: number("top-k"),
      max_new_tokens: number("most"),
    },
  };
}

async function answer(event) {
  event.preventDefault();
  going?.abort();
  going = new AbortController();
  const { signal } = going;
  const models = [byId("left").value, byId("right").value];
  run.scenes = { now: { kind: "group", title: "Answers", prompt: "", answer: "", panels: models.map(panelOf) } };
  findHomes();
  view.id = "left";
  byId("end").disabled = false;
  byId("said").textContent = "The models are asked …";
  const name = byId("run-name").value;
  try {
    await Promise.all(models.map((model, at) => listen(name, { ...wish(), model }, run.scenes.now.panels[at], signal)));
    byId("said").textContent = "";
  } catch (error) {
    byId("said").textContent = signal.aborted ? "Stopped." : error.message;
  }
  if (going?.signal === signal) byId("end").disabled = true;
}

function panelOf(model, at) {
  return {
    id: ["left", "right"][at],
    title: model,
    facts: [],
    tokens: { piece: [], action: [] },
    streams: { logprob: [], entropy: [] },
  };
}

async function listen(name, body, panel, signal) {
  const response = await fetch(`/speak/${pathOf(name)}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Pertoken": studio.token },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(problemIn(await response.text()) || `the server answers ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    lines.filter(Boolean).forEach((line) => hear(panel, JSON.parse(line)));
    showSoon();
  }
}

function hear(panel, row) {
  if (row.error) throw new Error(row.error);
  if (row.begun) return;
  panel.tokens.piece.push(row.piece);
  panel.tokens.action.push(1);
  panel.streams.logprob.push(row.logprob);
  panel.streams.entropy.push(row.entropy);
  panel.places = panel.counts = undefined;
  const nats = panel.streams.logprob.reduce((sum, logprob) => sum + logprob, 0);
  panel.facts = [`${panel.tokens.piece.length} tokens`, `log-prob ${short(nats)}`];
}

let drawn = false;

// At most once for each picture on the screen, however fast tokens come.
function showSoon() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    showScene();
  });
}

Object.assign(view, { stream: "logprob", marks: false });
listenToScene();
byId("speak").addEventListener("submit", answer);
byId("end").addEventListener("click", () => going?.abort());
byId("run-name").addEventListener("change", modelsOf);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("speak").requestSubmit();
});
if (byId("run-name").value) modelsOf();

// The form for a new run: what is filled in goes over the settings that it begins with.

function filled() {
  const fields = [...document.querySelectorAll("#settings [data-name]")];
  const settings = fields.filter((node) => node.value.trim()).map((node) => `${node.dataset.name}=${node.value.trim()}`);
  const more = byId("more").value.split("\n").map((line) => line.trim()).filter(Boolean);
  return { base: byId("base").value || null, settings: [...settings, ...more] };
}

async function send(start) {
  byId("said").textContent = start ? "Starting …" : "";
  byId("resolved").textContent = "";
  try {
    const answer = await call("/launch", { ...filled(), start });
    byId("said").textContent = answer.said;
    byId("resolved").textContent = answer.config;
  } catch (error) {
    byId("said").textContent = error.message;
  }
}

// Shows the settings whose name or meaning has the words.
function find() {
  const words = byId("find").value.trim().toLowerCase();
  for (const group of document.querySelectorAll("#settings details")) {
    const rows = [...group.querySelectorAll(".setting")];
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(words);
    group.hidden = rows.every((row) => row.hidden);
    if (words) group.open = !group.hidden;
  }
}

byId("find").addEventListener("input", find);
byId("check").addEventListener("click", () => send(false));
byId("launch").addEventListener("submit", (event) => {
  event.preventDefault();
  send(true);
});

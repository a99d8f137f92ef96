// A blind sheet: texts go in through textContent alone, choices stay in this browser until they are saved.

const sheet = JSON.parse(document.getElementById("data").textContent);
const LABELS = { left: "Left is better", same: "As good", right: "Right is better" };
const kept = `pertoken-sheet-${sheet.sheet}`;
let state = { rater: "", choices: {} };

try {
  const before = JSON.parse(localStorage.getItem(kept));
  if (before && typeof before.choices === "object") state = before;
} catch (error) {
  // a browser that keeps nothing for local files: choices last until the page is closed
}

function keep() {
  try {
    localStorage.setItem(kept, JSON.stringify(state));
  } catch (error) {
    // as above
  }
  const judged = sheet.items.filter((item) => state.choices[item.id]).length;
  document.getElementById("progress").textContent = `${judged} of ${sheet.items.length} judged`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function side(title, text) {
  const box = element("div");
  box.append(element("h2", "", title), element("div", "text", text || "(empty)"));
  return box;
}

function card(item, place) {
  const article = element("article");
  article.setAttribute("aria-label", `Item ${place + 1}`);
  article.append(element("h2", "", `${place + 1} of ${sheet.items.length}`), element("div", "text prompt", item.prompt));
  const sides = element("div", "sides");
  sides.append(side("Left", item.left), side("Right", item.right));
  const choice = element("div", "choice");
  const buttons = Object.entries(LABELS).map(([value, label]) => {
    const button = element("button", "", label);
    button.type = "button";
    button.addEventListener("click", () => {
      if (state.choices[item.id] === value) delete state.choices[item.id];
      else state.choices[item.id] = value;
      show();
      keep();
    });
    choice.append(button);
    return [value, button];
  });
  const show = () => buttons.forEach(([value, b]) => b.setAttribute("aria-pressed", state.choices[item.id] === value));
  show();
  article.append(sides, choice);
  if (item.reference) {
    const reference = element("details");
    reference.append(element("summary", "", "Reference answer"), element("div", "text", item.reference));
    article.append(reference);
  }
  return article;
}

const rater = document.getElementById("rater");
rater.value = state.rater;
rater.addEventListener("input", () => {
  state.rater = rater.value;
  keep();
});

document.getElementById("save").addEventListener("click", () => {
  const content = JSON.stringify({ sheet: sheet.sheet, rater: state.rater, choices: state.choices }, null, 1);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `choices-${sheet.sheet}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
});

document.getElementById("items").replaceChildren(...sheet.items.map(card));
keep();

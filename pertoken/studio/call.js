// What all pages of the studio share: talking to the server that they come from.

const studio = run.studio || {};

async function call(path, body) {
  const post = {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Pertoken": studio.token },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, body === undefined ? {} : post);
  const text = await response.text();
  if (!response.ok) throw new Error(problemIn(text) || `the server answers ${response.status}`);
  return JSON.parse(text);
}

function problemIn(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    return text.slice(0, 300);
  }
}

// Calls `look` again and again, less often while nobody watches or nobody answers.
function watch(look, seconds) {
  const again = async () => {
    let wait = seconds();
    try {
      if (!document.hidden) await look();
    } catch {
      wait *= 4;
    }
    setTimeout(again, 1000 * wait);
  };
  setTimeout(again, 1000 * seconds());
}

const pathOf = (name) => name.split("/").map(encodeURIComponent).join("/");

function button(text, act) {
  const node = element("button", { type: "button", textContent: text });
  node.addEventListener("click", act);
  return node;
}

function labelled(text, node) {
  return element("label", {}, `${text} `, node);
}

function choice(values, chosen) {
  const node = element("select", {}, ...values.map((value) => element("option", { value, textContent: value })));
  node.value = chosen;
  return node;
}

function field(type, value, properties = {}) {
  return element("input", { type, value, ...properties });
}

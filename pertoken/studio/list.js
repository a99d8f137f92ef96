// The table of runs, as they are now.

let shown = null;

async function renewTable() {
  const { table } = await call("/runs.json");
  if (table === shown) return;
  shown = table;
  const place = byId("table");
  const chosen = new Set([...place.querySelectorAll(":checked")].map((box) => box.value));
  const focused = document.activeElement?.closest("#table tr")?.querySelector("input")?.value;
  place.innerHTML = table; // made and escaped by the server, as the page itself
  for (const box of place.querySelectorAll("input")) {
    box.checked = chosen.has(box.value);
    if (box.value === focused) box.focus();
  }
}

watch(renewTable, () => 3);

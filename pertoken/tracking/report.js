// The page around the samples: theme and charts.

// The theme follows the system until the reader chooses; ?theme=dark sets it from outside.
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

const PLOT_OPTIONS = { responsive: true, displayModeBar: false, displaylogo: false };

// Plotly is as large as the rest of the page ten times over, so it is read after the first picture is on the screen. A
// server has it by itself, once for all its pages; what it sends must be what the page's policy allows.
async function loadPlotly() {
  const { textContent, dataset } = byId("plotly");
  const source = dataset.source ? await (await fetch(dataset.source)).text() : textContent;
  document.head.append(element("script", { textContent: source }));
  drawCharts();
}

// A chart is drawn when it comes near the window: a page with many curves opens as fast as one with few.
function drawCharts() {
  const draw = (place) => {
    const { data, layout } = run.charts[Number(place.dataset.chart)];
    Plotly.newPlot(place, data, layout, PLOT_OPTIONS);
  };
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((candidate) => candidate.isIntersecting)) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  document.querySelectorAll(".plot:not(.js-plotly-plot)").forEach((place) => watcher.observe(place));
}

setTheme(new URLSearchParams(location.search).get("theme") || "auto");
byId("theme").addEventListener("click", nextTheme);
if (run.orders.length) queueMicrotask(startBrowser); // when what a server adds to the page has been read too
if (byId("plotly").textContent || byId("plotly").dataset.source) window.addEventListener("load", () => setTimeout(loadPlotly, 50));

// Draws the figures in the reader's appearance, and sorts tables.
(() => {
  "use strict";
  const { figures, templates } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  let printing = false;

  function draw(figure) {
    const theme = dark.matches && !printing ? "dark" : "light";
    const panel = figure.querySelector("select")?.value
      ?? Object.keys(figures[theme][figure.dataset.figure])[0].split("|")[0];
    const axis = figure.querySelector("input:checked")?.value;
    const chosen = figures[theme][figure.dataset.figure][axis ? `${panel}|${axis}` : panel];
    const { data, layout } = structuredClone(chosen);
    layout.template = templates[theme];
    if (narrow.matches) {
      // A finger that moves over the plot scrolls the page.
      Object.assign(layout, { dragmode: false });
      layout.font = { size: 11 };
      for (const trace of data) if (trace.colorbar) trace.showscale = false;
    }
    return Plotly.react(figure.querySelector(".canvas"), data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: narrow.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  }

  const plots = [...document.querySelectorAll("figure.plot")];
  const drawAll = () => plots.forEach(draw);
  for (const figure of plots) figure.addEventListener("change", () => draw(figure));
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });

  function compare(a, b) {
    const numbers = [Number(a), Number(b)];
    return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
  }

  function sort(header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    const table = header.closest("table");
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[header.cellIndex].dataset.value;
    const rows = [...body.rows];
    rows.sort((left, right) => {
      const [a, b] = [value(left), value(right)];
      // What is not known comes last either way.
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return descending ? compare(b, a) : compare(a, b);
    });
    body.append(...rows);
  }

  for (const header of document.querySelectorAll("thead th")) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }
})();

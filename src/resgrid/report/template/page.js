"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#AA4499", "#88CCEE", "#DDAA33"];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;

  // The tables work without plotly.
  for (const table of all("table:not(.heat)")) {
    const value = (row, column) => row.cells[column].textContent.trim();
    const number = (text) => parseFloat(text.replaceAll(",", ""));
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.tabIndex = 0;
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") head.click(); });
      head.addEventListener("click", () => {
        const falls = head.ariaSort !== "descending";
        for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
        head.ariaSort = falls ? "descending" : "ascending";
        const order = (a, b) => {
          const [one, two] = [value(a, column), value(b, column)];
          const [x, y] = [number(one), number(two)];
          if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? one.localeCompare(two) : isNaN(x) - isNaN(y);
          return falls ? y - x : x - y;
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      });
    });
  }

  const chooser = document.getElementById("choose-cell");
  const showMistakes = () => {
    for (const facts of all(".facts")) facts.hidden = facts.dataset.cell !== chooser.value;
    const mistakes = data.mistakes.cells[chooser.value];
    const place = document.getElementById("mistakes");
    place.replaceChildren(...mistakes.map((each) => {
      const [figure, image, text] = ["figure", "img", "figcaption"].map((name) => document.createElement(name));
      image.src = data.mistakes.images[each.image];
      text.textContent = `${each.taken}, ${each.confidence} % sure; is ${each.is}`;
      image.alt = text.textContent;
      figure.append(image, text);
      return figure;
    }));
    if (!mistakes.length) place.textContent = "It made none.";
  };

  const compressed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  try {
    const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  } catch (error) {
    const trouble = document.getElementById("trouble");
    trouble.textContent = "The charts need a browser of 2023 or newer; the tables and sentences do not.";
    trouble.hidden = false;
    if (chooser) { chooser.addEventListener("change", showMistakes); showMistakes(); }
    return;
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const template = () => {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--soft"), linecolor: colour("--line") };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: colours,
        font: { color: colour("--ink"), size: 13, family: "system-ui, sans-serif" },
        xaxis: axis, yaxis: axis,
        hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      },
      data: { heatmap: [{ textfont: { color: colour("--ink") } }] },
    };
  };
  // A chart must not catch the finger that scrolls the page.
  const draw = (place, traces, layout) => Plotly.react(
    place, traces,
    { ...layout, template: template(), dragmode: touch ? false : "zoom" },
    { responsive: true, displaylogo: false, displayModeBar: false },
  );

  const drawCell = () => {
    for (const place of all("[data-chosen]:not([data-chosen=curves])")) {
      const { layout, cells } = data.chosen[place.dataset.chosen];
      draw(place, cells[chooser.value], layout);
    }
  };
  const drawCurves = () => {
    const { layout, cells } = data.chosen.curves;
    const chosen = all("#choose-curves :checked").map((box) => box.value);
    const traces = chosen.flatMap((cell, place) => cells[cell].map(
      (trace) => ({ ...trace, line: { ...trace.line, color: colours[place % colours.length] } }),
    ));
    draw(document.querySelector("[data-chosen=curves]"), traces, layout);
  };
  const drawAll = () => {
    for (const place of all("[data-chart]")) {
      const { data: traces, layout } = data.charts[place.dataset.chart];
      draw(place, traces, layout);
    }
    if (data.chosen.curves) drawCurves();
    if (chooser) drawCell();
  };

  if (chooser) {
    chooser.addEventListener("change", () => { showMistakes(); drawCell(); });
    showMistakes();
  }
  document.getElementById("choose-curves")?.addEventListener("change", drawCurves);
  dark.addEventListener("change", drawAll);
  drawAll();
})();

"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const chooser = document.getElementById("choose-cell");
  const showMistakes = () => {
    const figures = data.mistakes.cells[chooser.value].map(([place, text]) => {
      const [figure, image] = [document.createElement("figure"), new Image()];
      [image.src, image.alt] = [data.mistakes.images[place], text];
      figure.append(image, text);
      return figure;
    });
    document.getElementById("mistakes").replaceChildren(...(figures.length ? figures : ["It made none."]));
  };

  const compressed = Uint8Array.from(atob(document.getElementById("vega").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  const draw = (place, spec, rows) => vegaEmbed(place, { ...spec, description: place.ariaLabel, datasets: { rows } }, {
    mode: "vega-lite", renderer: "svg", actions: false,
    config: data.themes[dark.matches ? "dark" : "light"], tooltip: { theme: dark.matches ? "dark" : "light" },
  });
  // The data are a list a column, which become an object a row.
  const zip = (columns, more = {}) => (Object.values(columns)[0] ?? []).map(
    (_, row) => ({ ...more, ...Object.fromEntries(Object.entries(columns).map(([name, of]) => [name, of[row]])) }),
  );

  const drawCell = () => all("[data-chosen]:not([data-chosen=curves])").map((place) => {
    const { spec, cells } = data.chosen[place.dataset.chosen];
    return draw(place, spec, zip(cells[chooser.value]));
  });
  const drawCurves = () => {
    const { spec, cells } = data.chosen.curves;
    const chosen = all("#choose-curves :checked").map((box) => box.value);
    return draw(
      document.querySelector("[data-chosen=curves]"), spec, chosen.flatMap((cell) => zip(cells[cell], { cell })),
    );
  };
  const drawAll = () => Promise.all([
    ...all("[data-chart]").map((place) => {
      const { spec, columns } = data.charts[place.dataset.chart];
      return draw(place, spec, zip(columns));
    }),
    ...(chooser ? [drawCurves(), ...drawCell()] : []),
  ]);

  if (chooser) {
    chooser.addEventListener("change", () => { showMistakes(); drawCell(); });
    showMistakes();
  }
  document.getElementById("choose-curves")?.addEventListener("change", drawCurves);
  dark.addEventListener("change", drawAll);
  await drawAll();
})();

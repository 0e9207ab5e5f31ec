"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const dark = new Map(Object.entries(read("dark")));
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
  };

  // Figures come in the light colours; a fresh copy is made each time, since plotly writes into what it is given.
  const themed = (figure) =>
    JSON.parse(JSON.stringify(figure), (key, value) =>
      scheme.matches && typeof value === "string" && dark.has(value) ? dark.get(value) : value);

  const draw = (place) => {
    const chosen = [...place.closest("figure").querySelectorAll("select")].map((select) => select.value);
    const figure = themed(figures[place.dataset.figure][chosen.join("|")]);
    return Plotly.react(place, figure.data, figure.layout, config);
  };

  const places = [...document.querySelectorAll(".plot")];
  for (const place of places) {
    draw(place);
    for (const select of place.closest("figure").querySelectorAll("select"))
      select.addEventListener("change", () => draw(place));
  }
  scheme.addEventListener("change", () => places.forEach(draw));
})();

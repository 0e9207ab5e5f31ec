"use strict";
(async () => {
  const text = (id) => document.getElementById(id).textContent;
  const figures = JSON.parse(text("figures"));
  const dark = new Map(Object.entries(JSON.parse(text("dark"))));
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
  };

  // plotly.js lies in the page gzipped, at a third of its size.
  const load = async () => {
    const bytes = Uint8Array.from(atob(text("plotly")), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  // Figures come in the light colours; a fresh copy is made each time, since plotly writes into what it is given.
  const themed = (figure, light) =>
    JSON.parse(JSON.stringify(figure), (key, value) =>
      !light && scheme.matches && typeof value === "string" && dark.has(value) ? dark.get(value) : value);

  const draw = (place, paper) => {
    const chosen = [...place.closest("figure").querySelectorAll("select")].map((select) => select.value);
    const figure = themed(figures[place.dataset.figure][chosen.join("|")], paper);
    return Plotly.react(place, figure.data, { ...figure.layout, ...paper }, config);
  };

  const places = [...document.querySelectorAll(".plot")];
  if (places.length) await load();
  for (const place of places) {
    await draw(place);
    for (const select of place.closest("figure").querySelectorAll("select"))
      select.addEventListener("change", () => draw(place));
  }
  scheme.addEventListener("change", () => places.forEach((place) => draw(place)));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((folded) => (folded.open = true));
    places.forEach((place) => draw(place, { width: 680 }));
  });
  addEventListener("afterprint", () => places.forEach((place) => draw(place)));
  document.body.dataset.drawn = "yes";
})();

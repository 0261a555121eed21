"use strict";
(() => {
  const variables = JSON.parse(document.getElementById("colours").textContent);
  const options = {displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]]};
  const dark = matchMedia("(prefers-color-scheme: dark)");

  /* as the style sheet turns over drawings in the colours of a scale: invert(1) hue-rotate(180deg) */
  const turned = hex => {
    const [r, g, b] = [1, 3, 5].map(i => 255 - parseInt(hex.slice(i, i + 2), 16));
    const rotated = [-.574 * r + 1.43 * g + .144 * b, .426 * r + .43 * g + .144 * b, .426 * r + 1.43 * g - .856 * b];
    return "#" + rotated.map(x => Math.round(Math.min(255, Math.max(0, x))).toString(16).padStart(2, "0")).join("");
  };

  /* the same drawing in the colours that the page has now */
  const themed = (thing, style) => {
    if (typeof thing === "string" && /^#[0-9a-f]{6}([0-9a-f]{2})?$/.test(thing)) {
      const [colour, alpha] = [thing.slice(0, 7), thing.slice(7)];
      const variable = variables[colour];
      return (variable ? style.getPropertyValue(variable).trim() : dark.matches ? turned(colour) : colour) + alpha;
    }
    if (Array.isArray(thing)) return thing.map(each => themed(each, style));
    if (thing && typeof thing === "object") {
      return Object.fromEntries(Object.entries(thing).map(([key, each]) => [key, themed(each, style)]));
    }
    return thing;
  };

  const draw = panel => {
    const spec = JSON.parse(panel.querySelector("script").textContent);
    const {data, layout} = themed(spec, getComputedStyle(document.documentElement));
    layout.font.family = getComputedStyle(document.documentElement).getPropertyValue("--sans").trim();
    panel.classList.add("drawn");
    Plotly.react(panel.querySelector(".live"), data, layout, options).catch(() => panel.classList.remove("drawn"));
  };

  const seen = new IntersectionObserver(entries => entries.forEach(entry => {
    if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }), {rootMargin: "400px"});

  document.querySelectorAll(".plotted").forEach(panel => seen.observe(panel));
  dark.addEventListener("change", () => document.querySelectorAll(".plotted.drawn").forEach(draw));
})();

/* Light or dark: what was chosen on a page, else what the system says. Not a module, so that it runs before the page is
   drawn. A button with the id "theme" switches. */
"use strict";
{
  const root = document.documentElement;
  const isSystemDark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return JSON.parse(localStorage.getItem("rayline.theme"));
    } catch {
      return null; // none kept, or none may be kept
    }
  };
  const show = () => {
    root.dataset.theme = chosen() ?? (isSystemDark.matches ? "dark" : "light");
  };
  show();
  isSystemDark.addEventListener("change", show);
  addEventListener("storage", show); // another tab has switched
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#theme")) return;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("rayline.theme", JSON.stringify(root.dataset.theme));
    } catch {
      /* kept for as long as the page is open */
    }
  });
}

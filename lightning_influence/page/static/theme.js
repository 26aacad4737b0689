// Light or dark: as TensorBoard is, else as the system is.

/** Keep the theme of the page that of what is around it. */
export function followTheme() {
  const outer = parentBody();
  const system = matchMedia('(prefers-color-scheme: dark)');
  const apply = () => {
    const dark = outer ? outer.classList.contains('dark-mode') : system.matches;
    document.documentElement.dataset.theme = dark ? 'dark' : 'light';
    window.dispatchEvent(new Event('resize')); // canvases are painted again
  };
  if (outer) new MutationObserver(apply).observe(outer, { attributes: true, attributeFilter: ['class'] });
  else system.addEventListener('change', apply);
  apply();
}

/** @returns {HTMLElement | null} The body of the page that this one is a frame of. */
function parentBody() {
  try {
    return window.parent !== window ? window.parent.document.body : null;
  } catch {
    return null; // of another origin
  }
}

// The entry: TensorBoard imports this module and calls `render`.

import { App } from './app.js';
import { h } from './dom.js';
import { chooseHost } from './host.js';
import { followTheme } from './theme.js';

/** Show the page. */
export async function render() {
  const styled = document.querySelector('link[rel=stylesheet], head > style');
  if (!styled) {
    const style = h('link', { rel: 'stylesheet', href: new URL('./style.css', import.meta.url).href });
    await new Promise((done) => {
      style.addEventListener('load', done);
      style.addEventListener('error', done);
      document.head.append(style);
    });
  }
  followTheme();
  const app = new App(chooseHost());
  document.body.append(app.element);
  await app.start();
}

// What `index.html` starts; TensorBoard calls `render` itself.

import { render } from './index.js';

render();

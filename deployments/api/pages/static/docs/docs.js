/* The API's description by Swagger UI: its file defines SwaggerUIBundle. Nothing is asked of its makers' server. */
"use strict";

/** The names of operations as text: as links they would be within buttons. What is open is in the address all the same. */
const plainNames = ({ React }) => ({ components: { DeepLink: ({ text }) => React.createElement("span", null, text) } });

/** Examples scroll sideways, so the keyboard must reach them; and the field for a body has no label of its own. */
new MutationObserver(() => {
  for (const example of document.querySelectorAll("pre.microlight:not([tabindex])")) example.tabIndex = 0;
  for (const body of document.querySelectorAll("textarea.body-param__text:not([aria-label])")) body.ariaLabel = "Request body";
}).observe(document.getElementById("swagger-ui"), { childList: true, subtree: true });

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: true,
  plugins: [plainNames],
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});

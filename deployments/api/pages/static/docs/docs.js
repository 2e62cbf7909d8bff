/* The API's description by Swagger UI: its file defines SwaggerUIBundle. Nothing is asked of its makers' server. */
"use strict";
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: true,
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});

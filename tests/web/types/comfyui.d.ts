// The modules that ComfyUI serves under /scripts: they hand on its one app, and its one connection to the server.

declare module '*/scripts/app.js' {
  export const app: import('@comfyorg/comfyui-frontend-types').ComfyApp
}

declare module '*/scripts/api.js' {
  export const api: import('@comfyorg/comfyui-frontend-types').ComfyApi
}

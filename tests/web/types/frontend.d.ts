// What ComfyUI's package of types has and does not export by name, and what it lacks of a node: `addDOMWidget`.

import type { ComfyExtension, DOMWidget, DOMWidgetOptions } from '@comfyorg/comfyui-frontend-types'

declare module '@comfyorg/comfyui-frontend-types' {
  export type LGraphNode = Parameters<NonNullable<ComfyExtension['nodeCreated']>>[0] & {
    addDOMWidget<T extends HTMLElement, V extends object | string>(
      name: string,
      type: string,
      element: T,
      options?: DOMWidgetOptions<V>
    ): DOMWidget<T, V>
  }

  export type IBaseWidget = NonNullable<LGraphNode['widgets']>[number]

  export type SettingParams = NonNullable<ComfyExtension['settings']>[number]
}

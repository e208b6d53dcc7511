/** Read the JSON schemas of parameters. */

/**
 * Return a schema without references, and without the null that an optional field allows.
 * @param {object} schema
 * @param {object} root The schema that holds the definitions.
 * @returns {object} The schema; `nullable` is true if null was allowed.
 */
export function plainSchema(schema, root) {
  let plain = schema;
  let nullable = false;
  for (;;) {
    if (plain.$ref) {
      const { $ref, ...further } = plain;
      plain = { ...definition($ref, root), ...further };
      continue;
    }
    const branches = plain.anyOf?.filter((branch) => branch.type !== "null");
    if (branches?.length === 1) {
      nullable = nullable || branches.length < plain.anyOf.length;
      const { anyOf, ...further } = plain;
      plain = { ...branches[0], ...further };
      continue;
    }
    return nullable ? { ...plain, nullable } : plain;
  }
}

function definition(reference, root) {
  let target = root;
  for (const part of reference.replace("#/", "").split("/")) target = target[part];
  return target;
}

/** Return true for an object whose keys are free, such as {value name: weight}. */
export function isMap(schema) {
  return schema.type === "object" && typeof schema.additionalProperties === "object";
}

/**
 * Return an object without the parameters that its mode does not read; a server refuses them.
 * @param {object} value
 * @param {object} schema The schema of the object, with "x-read-if" in its properties.
 */
export function onlyRead(value, schema) {
  const properties = schema.properties ?? {};
  const isRead = ([key]) =>
    Object.entries(properties[key]?.["x-read-if"] ?? {}).every(([mode, values]) =>
      values.includes(value[mode] ?? properties[mode].default ?? null),
    );
  return Object.fromEntries(Object.entries(value).filter(isRead));
}

/** Return true for a number. */
export function isNumber(schema) {
  return schema.type === "number" || schema.type === "integer";
}

/**
 * Return the ends and the step of a slider for a number; null if its range is open.
 * @param {object} schema
 */
export function sliderRange(schema) {
  const hint = schema["x-slider"];
  if (hint) return hint;
  const minimum = schema.minimum ?? schema.exclusiveMinimum;
  const maximum = schema.maximum ?? schema.exclusiveMaximum;
  if (minimum === undefined || maximum === undefined || maximum - minimum > 1000) return null;
  const step = schema.type === "integer" ? 1 : (maximum - minimum) / 100;
  return { minimum, maximum, step };
}

/** Return true if two JSON values are equal. */
export function isEqual(left, right) {
  return JSON.stringify(left) === JSON.stringify(right);
}

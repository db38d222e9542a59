/* Words in two languages. A view brings its own (`words: {en, zh}`); those of the shell and the
   shared parts stand in words/. A test compares the keys of both.

   const t = translator("zh", view.words); t("layer"); t("tokens.count", {n: 7}) */

import en from "./words/en.js";
import zh from "./words/zh.js";

export const LANGUAGES = { en: "English", zh: "中文" };
const SHARED = { en, zh };

/** "" stands for the language that the browser prefers. */
export function languageOf(wanted) {
  if (Object.hasOwn(LANGUAGES, wanted)) return wanted;
  return navigator.languages.some((tag) => tag.toLowerCase().startsWith("zh")) &&
    !navigator.languages[0].toLowerCase().startsWith("en") ? "zh" : "en";
}

/** Looks among the view's words first. {name} in a text is replaced by values.name. A key without
    words is a mistake, unless it may be missing: then the text is "". */
export function translator(lang, words) {
  return (key, values = {}, maybe = false) => {
    const text = words?.[lang]?.[key] ?? SHARED[lang][key] ?? SHARED.en[key];
    if (text === undefined && maybe) return "";
    if (text === undefined) throw new Error(`no words for ${key}`);
    return text.replace(/\{(\w+)\}/g, (all, name) => (name in values ? values[name] : all));
  };
}

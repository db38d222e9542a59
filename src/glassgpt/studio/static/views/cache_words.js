/* Words of the cache view. */

export default {
  en: {
    steps: "Step by step",
    step1: "Next token", stepMany: "{n} more", again: "Start over",
    begin: "The first step reads the prompt of {n} tokens. If the server has already read the "
      + "beginning of it with this model, that part is reused.",
    reused: "reused from the cache", computed: "computed",
    with: "{n} positions computed", without: "{n} without a cache", saved: "{n} times less work",
    "head.number": "Step", "head.positions": "Positions the model looks at",
    "head.reused": "Reused", "head.computed": "Computed", "head.bytes": "Cache",
    "head.token": "Drawn",
    bytes: "What it costs",
    "factor.two": "keys and values", "factor.L": "layers (L)", "factor.K": "key/value heads (K)",
    "factor.D": "width of a head (D)", "factor.size": "bytes per number",
    perToken: "bytes per token",
    now: "In the cache now: {n} tokens", full: "A full context: {n} tokens",
    weights: "For comparison: all weights",
    grouped: "{H} query heads share {K} key/value heads: the cache is {times} times smaller than "
      + "with one for each query head (grouped-query attention).",
  },
  zh: {
    steps: "逐步",
    step1: "下一个词元", stepMany: "再来 {n} 个", again: "重新开始",
    begin: "第一步读入提示的 {n} 个词元；服务器此前用这个模型从头读过的部分会被复用。",
    reused: "从缓存复用", computed: "重新计算",
    with: "计算了 {n} 个位置", without: "没有缓存则要 {n} 个", saved: "工作量减少到 1/{n}",
    "head.number": "步", "head.positions": "模型看到的位置",
    "head.reused": "复用", "head.computed": "计算", "head.bytes": "缓存",
    "head.token": "抽到",
    bytes: "代价是多少",
    "factor.two": "键和值", "factor.L": "层数（L）", "factor.K": "键值头数（K）",
    "factor.D": "每头宽度（D）", "factor.size": "每个数的字节数",
    perToken: "字节/词元",
    now: "缓存中现有 {n} 个词元", full: "占满上下文：{n} 个词元",
    weights: "作为比较：全部权重",
    grouped: "{H} 个查询头共用 {K} 个键值头：缓存比每头各存一份小 {times} 倍（分组查询注意力）。",
  },
};

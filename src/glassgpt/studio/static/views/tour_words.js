/* Words of the tour. */

export default {
  en: {
    right: "Yes.", wrong: "Not quite.", see: "Look at it", back: "Back", on: "Next question",
    value: "Value", probability: "Probability", share: "Share", embedding: "before the first block",
    afterBlock: "after block {n}", block: "block {n}",
    "tokens.title": "Pieces",
    "tokens.ask": "How many tokens does the model read when it reads your text?",
    "tokens.tell": "The text has {words} words and {letters} characters; the tokenizer turns it "
      + "into {n} tokens. A character tokenizer makes a token of every character; a BPE "
      + "tokenizer joins characters that often occur together.",
    "next.title": "What comes next?",
    "next.ask": "The model gives every token of its vocabulary a probability to come next. Which one "
      + "does it find likeliest after your text?",
    "next.tell": "“{token}”, with {p}. These are the likeliest four; all others share the rest.",
    "looks.title": "Looking back",
    "looks.ask": "In layer {layer}, head {head}: which token does position {position}, “{token}”, "
      + "attend to most?",
    "looks.tell": "“{best}”: {p} of what this head gathers comes from it. Other heads look "
      + "elsewhere.",
    "future.title": "Looking ahead",
    "future.ask": "How many of the tokens that come later may a token look at?",
    "future.all": "all of them", "future.some": "only the next one", "future.none": "none of them",
    "future.tell": "The shares right of the diagonal sum to {sum}. If tokens could see the next one, "
      + "predicting it would be copying, and nothing would be learned.",
    "sink.title": "Where attention rests",
    "sink.ask": "A head that finds nothing to look at must still distribute its shares. How much "
      + "of all attention lies on the very first token, on average?",
    "sink.tell": "{p} here. In large trained models it is often much more: the first token carries "
      + "little meaning, so looking at it changes little.",
    "lens.title": "When is it decided?",
    "lens.ask": "Suppose the model had to answer early. From where on would it give its final "
      + "answer and no longer change it?",
    "lens.tell": "From {when} on it says “{token}”.",
    "surprise.title": "Surprise",
    "surprise.ask": "Which token of your text surprises the model most?",
    "surprise.tell": "“{token}”: a loss of {loss}, where the text has {mean} on average. The loss is "
      + "−log of the probability that the model gave the token that really came.",
    "off.title": "Without a block",
    "off.ask": "One block is switched off, and the residual stream flows past it. Which block "
      + "does the model miss most?",
    "off.tell": "Block {n}: the loss goes from {before} to {after}.",
  },
  zh: {
    right: "对。", wrong: "不完全对。", see: "去看看", back: "上一题", on: "下一题",
    value: "值", probability: "概率", share: "份额", embedding: "第一块之前",
    afterBlock: "第 {n} 块之后", block: "第 {n} 块",
    "tokens.title": "碎片",
    "tokens.ask": "模型读你的文本时，读到多少个词元？",
    "tokens.tell": "文本有 {words} 个词、{letters} 个字符；分词器把它变成 {n} 个词元。"
      + "字符模型逐个读字母，BPE 模型把常见的组合并在一起。",
    "next.title": "接下来是什么？",
    "next.ask": "模型给词表中每个词元一个接在后面的概率。你的文本之后，它认为哪个最可能？",
    "next.tell": "“{token}”，概率 {p}。这是最可能的四个，其余的分享剩下的概率。",
    "looks.title": "回头看",
    "looks.ask": "在第 {layer} 层第 {head} 头：位置 {position} 的“{token}”从哪个词元取得最多？",
    "looks.tell": "从“{best}”：占该头所收集的 {p}。别的头看别处。",
    "future.title": "向前看",
    "future.ask": "一个词元可以看到多少后面的词元？",
    "future.all": "全部", "future.some": "只有下一个", "future.none": "一个也不行",
    "future.tell": "对角线右侧的份额之和为 {sum}。如果能看到下一个词元，预测就成了照抄，什么也学不到。",
    "sink.title": "注意力停在哪里",
    "sink.ask": "一个无事可寻的头也必须把份额给出去。平均有多少注意力落在第一个词元上？",
    "sink.tell": "这里是 {p}。训练充分的大模型往往更多地停在第一个词元上：它几乎不带含义，看它也就几乎不改变什么。",
    "lens.title": "何时决定？",
    "lens.ask": "如果模型必须提前回答：从哪里开始，它会一直给出最终的那个词元，不再改变主意？",
    "lens.tell": "从{when}起，它就说“{token}”。",
    "surprise.title": "意外",
    "surprise.ask": "你的文本中，哪个词元最让模型意外？",
    "surprise.tell": "“{token}”：损失 {loss}，而全文平均为 {mean}。损失是模型给真实词元的概率的负对数。",
    "off.title": "少一块",
    "off.ask": "关掉一块，让残差流从旁边流过。模型最缺不了哪一块？",
    "off.tell": "第 {n} 块：损失从 {before} 变为 {after}。",
  },
};

/* Words of the attention view. */

export default {
  en: {
    looks: "What the chosen token looks at",
    opened: "Layer {layer}, head {head}, step by step",
    picture: "Attention of the opened head: rows are queries, columns are keys",
    open: "Open this head ({size})",
    stages: "Steps of attention",
    "stage.raw_scores": "q · k", "stage.scores": "÷ √D", "stage.masked_scores": "mask",
    "stage.pattern": "softmax", "stage.weighted": "× v",
    "say.raw_scores": "Every cell is the dot product of a query and a key, {D} numbers each. It "
      + "says how well what the row asks for matches what the column offers.",
    "say.scores": "The scores are divided by √{D} = {root}. Otherwise they would grow with the "
      + "width of a head, and softmax would choose a single winner.",
    "say.masked_scores": "The scores of later tokens are set to −∞. If a token could look at "
      + "them, it would read the next token instead of predicting it.",
    "say.pattern": "Each row becomes shares that sum to 1: every score is exponentiated, then "
      + "divided by the sum of the row. −∞ becomes exactly 0.",
    "say.weighted": "What position {position} gathers: the value vector of every token (a row, {D} "
      + "numbers) times its share. The sum of the rows is the head’s output.",
    hideFirst: "hide the first token and renormalise",
    rowSum: "The shares of position {position} sum to {sum}.",
    sums: "The rows add up to the head’s output at position {position}, with a rounding error of "
      + "{off}.",
    sumsHidden: "Without the first token the sum differs from the head’s real output by up to {off}.",
    noMaskYet: "Not masked yet.",
  },
  zh: {
    looks: "所选词元在看什么",
    opened: "第 {layer} 层第 {head} 头，逐步展开",
    picture: "所打开的头的注意力：行提问，列回答",
    open: "打开这个头（{size}）",
    stages: "注意力的步骤",
    "stage.raw_scores": "q · k", "stage.scores": "÷ √D", "stage.masked_scores": "遮蔽",
    "stage.pattern": "softmax", "stage.weighted": "× v",
    "say.raw_scores": "每个查询遇到每个键：各 {D} 个数的点积，表示该行所求与该列所供有多匹配。",
    "say.scores": "再除以 √{D} = {root}。否则分数会随头的宽度增大，softmax 就只会选出一个赢家。",
    "say.masked_scores": "词元的未来被设为 −∞：不许看，否则预测下一个词元就成了照抄。",
    "say.pattern": "每一行变成总和为 1 的份额：先取指数，再除以总和。−∞ 恰好变成 0。",
    "say.weighted": "位置 {position} 收集的内容：每个词元的值向量（一行，{D} 个数）乘以它的份额。"
      + "各行相加就是这个头的输出。",
    hideFirst: "隐藏第一个词元并重新归一",
    rowSum: "位置 {position} 的份额之和为 {sum}。",
    sums: "各行相加等于该头在位置 {position} 的输出，舍入误差 {off}。",
    sumsHidden: "去掉第一个词元后，总和与该头的真实输出最多相差 {off}。",
    noMaskYet: "尚未遮蔽。",
  },
};

"""LanguageGame: causal language models as players. One module per arrow of the method:

base         a checkpoint, or adapters on one -> a model that is what its files say, and its tokenizer
chat         text -> tokens, of the prompts that are answered and of the pairs that are scored
generation   prompt -> the opponent's answer; vllm_watch: ends what vLLM runs in
logprobs     answer -> its log-probability, which is the score
game         all of it behind the contract that the rounds know
config       the settings of a run
lm_eval_tasks   benchmarks of lm-evaluation-harness
"""

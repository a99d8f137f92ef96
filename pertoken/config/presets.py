"""Published methods by name: which of the choices that this package is made of each of them is.

A method is not a class here. It is a row of settings (estimator of credit, surrogate, level of the ratio, average,
KL, number of passes), so `algorithm: grpo` in a configuration stands for the keys of its row, and every key can be
set otherwise beside it. The resolved configuration that is saved with a run names all of them.

Learning rates, batch sizes and lengths are not part of a row: they depend on the model, not on the method. What the
paper used is told in `published`. To add a method that is made of what exists: one more `Preset` below.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published method as settings."""

    title: str
    paper: str
    """Authors, year, address."""
    formula: str
    """Advantage and loss of one token, in the notation of docs/algorithms.md."""
    settings: Mapping[str, Any]
    """Sections and keys of the configuration that it sets."""
    published: str
    """What the paper (or its code) ran with, beyond the settings."""
    differs: str
    """Where this differs from the paper."""
    needs: str = ""
    """What the user has to bring."""

    def keys(self) -> dict[str, Any]:
        """The settings by dotted key, in the order of the table."""
        found: dict[str, Any] = {}
        for section, keys in self.settings.items():
            for key, value in keys.items():
                if isinstance(value, dict) and value:
                    found |= {f"{section}.{key}.{name}": setting for name, setting in value.items()}
                else:
                    found[f"{section}.{key}"] = value
        return found

    def told(self) -> dict[str, str]:
        """All that there is to say of it, label by label."""
        settings = "\n".join(f"{key}={json.dumps(value)}" for key, value in self.keys().items())
        told = {
            self.title: self.paper,
            "formula": self.formula,
            "settings": settings,
            "published with": self.published,
            "differs from the paper": self.differs,
        }
        return told | ({"needs": self.needs} if self.needs else {})


NO_KL = {"place": "none"}
NO_CRITIC = {"value_head": None}
CRITIC: dict[str, Any] = {"value_head": {}}
LOO = {"type": "leave_one_out"}
GROUP = {"type": "group_relative", "scale_by_std": True, "normalize": "none"}
PLAIN = {"surrogate": "policy_gradient", "level": "token", "entropy_coefficient": 0.0}
CLIP = {
    "surrogate": "clipped",
    "level": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "entropy_coefficient": 0.0,
}
ONCE = {"epochs": 1, "minibatches": 1}
UNCLIPPED = CLIP | {"clip_low": 1.0, "clip_high": 1e9}  # no ratio goes so far: exp is bounded
CLIP_HIGHER = CLIP | {"clip_high": 0.28}

PRESETS: Mapping[str, Preset] = MappingProxyType({
    "reinforce": Preset(
        title="REINFORCE with reward-to-go",
        paper="Williams 1992, https://doi.org/10.1007/BF00992696",
        formula="A_t = sum_{s>=t} gamma^(s-t) r_s;  l = -log pi(y_t) A_t;  sum over tokens / (rows * max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "reward_to_go", "gamma": 1.0, "normalize": "none"},
            "objective": PLAIN | {"over": "constant"},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="no baseline, gamma 1",
        differs="The sum over tokens is divided by a constant, which changes the step size only. With gamma below "
        "1 the factor gamma^t is dropped, as everywhere in practice: then it is no gradient of the discounted "
        "return.",
    ),
    "scst": Preset(
        title="SCST, self-critical sequence training (ReMax)",
        paper="Rennie et al. 2017, https://arxiv.org/abs/1612.00563; ReMax: Li et al. 2023, "
        "https://arxiv.org/abs/2310.10505",
        formula="A_i = R_i - R(greedy answer);  l = -log pi(y_t) A_i;  sum over tokens / (rows * max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "self_critical", "normalize": "none"},
            "objective": PLAIN | {"over": "constant"},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="one sample per image, reward CIDEr; ReMax: one sample per prompt, lr 1e-6",
        differs="One greedy decoding per prompt, and not per sample. The KL penalty, where there is one, is not "
        "in the reward of the greedy answer.",
    ),
    "rloo": Preset(
        title="RLOO, REINFORCE leave-one-out",
        paper="Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019",
        formula="A_i = R_i - mean of the other R_j of the prompt;  l = -log pi(y_t) A_i;  sum over tokens / (rows "
        "* max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": LOO | {"normalize": "none"},
            "objective": PLAIN | {"over": "constant"},
            "kl": {"place": "reward", "coefficient": 0.03},
            "update": ONCE,
        },
        published="4 samples per prompt, KL 0.03 (TL;DR) or 0.1 (HH) in the reward, lr 1e-6",
        differs="None in the gradient. TRL's RLOO clips a ratio of whole sequences; one update per rollout has no "
        "ratio.",
    ),
    "reinforce_pp": Preset(
        title="REINFORCE++",
        paper="Hu et al. 2025, https://arxiv.org/abs/2501.03262",
        formula="A_t = whiten over the batch of sum_{s>=t} (r_s - beta k1_s);  l = clipped surrogate;  token mean",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "reward_to_go", "gamma": 1.0, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "reward", "coefficient": 0.01},
            "update": ONCE | {"minibatches": 4},
        },
        published="KL 0.01 in the reward, gamma 1, clip 0.2, lr 5e-7",
        differs="4 optimiser steps per rollout, which the paper makes depend on its batch size.",
    ),
    "a2c": Preset(
        title="A2C, advantage actor-critic",
        paper="Mnih et al. 2016, https://arxiv.org/abs/1602.01783",
        formula="A_t = sum_{s>=t} r_s - V(s_t);  l = -log pi(y_t) A_t - c_e H;  token mean; critic 0.5 * 0.5 (V - "
        "G)^2",
        settings={
            "policy": {"value_head": {"coefficient": 0.5, "clip": None}},
            "credit": {"type": "gae", "gamma": 1.0, "lam": 1.0, "normalize": "none"},
            "objective": PLAIN | {"over": "token", "entropy_coefficient": 0.001},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="RMSProp, value coefficient 0.5, entropy 0.01, 5 steps per update (games)",
        differs="Whole episodes and lambda 1 in place of 5-step returns; AdamW; a tenth of the entropy bonus, "
        "since a vocabulary has far more entropy than a joystick.",
    ),
    "ppo": Preset(
        title="PPO with token-level GAE",
        paper="Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language: Ouyang et al. 2022, "
        "https://arxiv.org/abs/2203.02155",
        formula="A_t = whitened GAE(gamma 1, lambda 0.95);  l = max(-A w, -A clip(w, 0.8, 1.2));  token mean; "
        "critic clipped at 0.2",
        settings={
            "policy": {"value_head": {"coefficient": 0.1, "clip": 0.2}},
            "credit": {"type": "gae", "gamma": 1.0, "lam": 0.95, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "reward", "coefficient": 0.05},
            "update": {"epochs": 4, "minibatches": 1},
        },
        published="InstructGPT: KL 0.02, clip 0.2, gamma 1, lambda 0.95, one pass over 512 samples in minibatches "
        "of 64; TRL: KL 0.05, 4 passes, value coefficient 0.1",
        differs="The critic is a head on the policy's own trunk. Completions that were cut off are worth what the "
        "critic says, not 0. No dual clip (verl always has one).",
    ),
    "nlpo": Preset(
        title="NLPO, PPO within what an older copy of the policy finds likely",
        paper="Ramamurthy et al. 2022, https://arxiv.org/abs/2210.01241",
        formula="K(s) = the smallest set of tokens with mass 0.9 under pi_psi, and the end;  y ~ pi restricted to "
        "K(s);  psi <- pi every 5 steps;  advantage and loss as PPO, of the restricted pi",
        settings={
            "policy": {"value_head": {"coefficient": 0.5, "clip": None}},
            "rollout": {"mask": {"top_p": 0.9, "least": 1, "refresh_every": 5}},
            "credit": {"type": "gae", "gamma": 0.99, "lam": 0.95, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "reward", "coefficient": 0.1},
            "update": {"epochs": 5, "minibatches": 1},
        },
        published="RL4LMs on IMDB: mass 0.9 but at least 100 tokens, the mask refreshed every 5 iterations (up to 100 "
        "elsewhere), 5 passes over 1280 tokens in minibatches of 64, KL 0.1 with an adaptive target, gamma 0.99, "
        "lambda 0.95, value coefficient 0.5, lr 1e-5",
        differs="Log-probs, and with them the KL to the reference, are those of the restricted distribution, which was "
        "sampled; RL4LMs samples from it and trains the unrestricted one, since its masked logits are not normalised "
        "again. The critic is a head on the policy's own trunk. Held-out answers go without the mask. The mass is "
        "counted behind bans and temperature.",
    ),
    "trpo": Preset(
        title="TRPO, trust region policy optimisation",
        paper="Schulman et al. 2015, https://arxiv.org/abs/1502.05477",
        formula="A_t = whitened GAE(gamma 1, lambda 0.95);  l = -w A, token mean;  step -b (F + 0.1)^-1 grad l with "
        "mean KL(pi_old || pi) <= 0.01 nats per token, by conjugate gradients and a line search",
        settings={
            "policy": {
                "precision": "float32",
                "value_head": {"coefficient": 0.5, "clip": None, "detach_trunk": True},
            },
            "credit": {"type": "gae", "gamma": 1.0, "lam": 0.95, "normalize": "whiten"},
            "objective": UNCLIPPED | {"over": "token"},
            "kl": NO_KL,
            "update": ONCE
            | {"trust_region": {"kl": 0.01, "iterations": 10, "damping": 0.1, "shrink": 0.8, "tries": 10}},
        },
        published="KL 0.01, 10 conjugate gradients, damping 0.1 (games and locomotion); RL4LMs: 15, line search of 10 "
        "tries by 0.8, 10 updates of the critic, gamma 0.99, lambda 0.95",
        differs="GAE in place of returns of Monte Carlo. The critic is a head on the policy's own trunk, which it does "
        "not move, and makes one step of AdamW. The KL is a mean over tokens, so long completions count more.",
    ),
    "rto": Preset(
        title="RTO, reinforced token optimisation",
        paper="Zhong et al. 2024, https://arxiv.org/abs/2404.18922",
        formula="r_t = 0.05 log(pi_dpo / pi_ref)(y_t), clipped to +-0.05, + reward of the whole text at its end - 0.01 "
        "log(pi / pi_ref)(y_t);  advantage and loss as PPO",
        settings={
            "policy": {"value_head": {"coefficient": 0.1, "clip": 0.2}},
            "credit": {"type": "gae", "gamma": 1.0, "lam": 0.95, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "reward", "coefficient": 0.01},
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="token rewards of beta 0.05 clipped to +-0.05, a normalised reward model clipped to +-10, KL "
        "0.01, batch 1024, lr 5e-7 and 9e-6 for the critic",
        differs="The critic is a head on the policy's own trunk. Rewards are the user's to name, see below. The sum of "
        "the token rewards is itself a reward of texts and no potential: the best policy is another one than without "
        "it, and the clipping makes it another one again.",
        needs="rewards: {name: implicit, model: what DPO has trained, reference: what it began with, beta: 0.05, clip: "
        "[-0.05, 0.05]} and one of whole texts; docs/offline.md has the chain sft, dpo, rto in one file",
    ),
    "vc_ppo": Preset(
        title="VC-PPO, value-calibrated PPO",
        paper="Yuan et al. 2025, https://arxiv.org/abs/2503.01491",
        formula="as PPO; critic target with lambda 1, advantage with lambda 0.95; the critic is trained alone first",
        settings={
            "policy": {"value_head": {"coefficient": 0.1, "clip": 0.2, "pretrain_steps": 10}},
            "credit": {"type": "gae", "gamma": 1.0, "lam": 0.95, "lam_critic": 1.0, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": NO_KL,
            "update": {"epochs": 4, "minibatches": 1},
        },
        published="value pre-training of 100 steps, lambda 0.95 for the policy and 1 for the critic",
        differs="The critic is a head: pre-training moves the head and not the trunk, and takes 10 steps unless "
        "told otherwise.",
    ),
    "vapo": Preset(
        title="VAPO",
        paper="Yue et al. 2025, https://arxiv.org/abs/2504.05118",
        formula="as VC-PPO; lambda of the policy 1 - 1 / (0.05 L) for a completion of L tokens; clip 0.2 / 0.28; "
        "token mean",
        settings={
            "policy": {"value_head": {"coefficient": 0.1, "clip": 0.2, "pretrain_steps": 10}},
            "credit": {"type": "gae", "gamma": 1.0, "lam_critic": 1.0, "length_adaptive": 0.05, "normalize": "whiten"},
            "objective": CLIP_HIGHER | {"over": "token"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="alpha 0.05, 50 steps of value pre-training, 16 samples per prompt, 0.1 * log-likelihood of "
        "right answers",
        differs="Without the log-likelihood term of right answers. lambda is held at 0 below 20 tokens, where the "
        "formula is negative; short texts want a larger credit.length_adaptive.",
    ),
    "vineppo": Preset(
        title="VinePPO, Monte-Carlo values of steps",
        paper="Kazemnejad et al. 2024, https://arxiv.org/abs/2410.01679",
        formula="A_t = V(state behind the step of t) - V(state before it), V = mean return of 9 rollouts, whitened;  "
        "l = clipped surrogate + 1e-4 k3;  token mean",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "monte_carlo", "rollouts": 9, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "loss", "coefficient": 1e-4, "estimator": "k3"},
            "update": {"epochs": 2, "minibatches": 4},
        },
        published="9 rollouts from each step of a solution, 8 samples for each of 64 prompts, optimiser steps of 64 "
        "samples, 2 passes, clip 0.2, lr 1e-6; values of at most 20 steps (25 for GSM8K)",
        differs="A step ends with a line break (credit.after), or after so many tokens (credit.every); the paper cuts "
        "solutions by rules of its own. Behind the last estimated state the rest of the text is one step; the paper's "
        "code reuses the last value there, which leaves that part an advantage of 0 up to the end.",
    ),
    "grpo": Preset(
        title="GRPO",
        paper="Shao et al. 2024, https://arxiv.org/abs/2402.03300",
        formula="A_i = (R_i - mean R) / (std R + 1e-4) in the group;  l = clipped surrogate + 0.04 k3;  mean over "
        "sequences of token means",
        settings={
            "policy": NO_CRITIC,
            "credit": GROUP,
            "objective": CLIP | {"over": "sequence"},
            "kl": {"place": "loss", "coefficient": 0.04, "estimator": "k3"},
            "update": ONCE,
        },
        published="64 samples per prompt, beta 0.04, lr 1e-6, one update per rollout, batch 1024",
        differs="None. Its k3 penalty gives the gradient of KL(reference || policy), not of KL(policy || "
        "reference): set kl.estimator=ratio_k3 for the latter. The standard deviation is divided by n - 1.",
    ),
    "grpo_process": Preset(
        title="GRPO with process rewards",
        paper="Shao et al. 2024, https://arxiv.org/abs/2402.03300, sec. 4.1.3",
        formula="n_t = (r_t - mean r) / (std r + 1e-4) over the group's scored tokens;  A_t = sum_{s>=t} n_s;  "
        "loss as GRPO",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "group_process", "gamma": 1.0, "scale_by_std": True, "normalize": "none"},
            "objective": CLIP | {"over": "sequence"},
            "kl": {"place": "loss", "coefficient": 0.04, "estimator": "k3"},
            "update": ONCE,
        },
        published="as GRPO, with a process reward model that scores steps",
        differs="Scored is what has a reward other than 0. It is no unbiased gradient: how many terms a token "
        "collects depends on the length of its row.",
        needs="a reward that scores tokens or steps, none of them 0",
    ),
    "prime": Preset(
        title="PRIME, implicit process rewards learnt online",
        paper="Cui et al. 2025, https://arxiv.org/abs/2502.01456",
        formula="r_t = 0.05 log(pi_phi / pi_ref)(y_t) + outcome at the end;  phi by -log sigmoid(+-0.05 sum of them) "
        "of right and wrong answers, each step;  A_t = whitened leave-one-out of sum_{s>=t} r_s;  clipped, token mean",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "leave_one_out_process", "gamma": 1.0, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="4 samples per prompt, beta 0.05, prompts filtered by how many of their answers are right",
        differs="The baseline of a token is the others' return-to-go at the same place, not their mean per token; "
        "the process reward is beta times the log-ratio, as the paper has it (its code leaves beta out). No filter of "
        "prompts. An answer is scored by the process reward of before its update.",
        needs="rewards: {name: prime, model: the policy's, outcome: a name} and the part of that name, which pays "
        "right answers 1 and wrong ones 0",
    ),
    "online_dpo": Preset(
        title="Online DPO",
        paper="Guo et al. 2024, https://arxiv.org/abs/2402.04792",
        formula="A_t = +-beta sigmoid(-beta (h_best - h_worst)) of the best and the worst paid sample of a prompt, h = "
        "sum_t log(pi / pi_ref)(y_t);  l = -log pi(y_t) A_t;  sum over tokens / (rows * max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "online_dpo", "beta": 0.1, "normalize": "none"},
            "objective": PLAIN | {"over": "constant"},
            "kl": NO_KL | {"measure": True},
            "update": ONCE,
        },
        published="2 samples per prompt, of which a language model chooses the better one; TRL: beta 0.1, lr 5e-7",
        differs="The rewards choose. One optimiser step per rollout, in which this is the gradient of DPO's loss of "
        "the pair; the sum over pairs is divided by a constant, which changes the step size only.",
    ),
    "dr_grpo": Preset(
        title="Dr. GRPO, GRPO done right",
        paper="Liu et al. 2025, https://arxiv.org/abs/2503.20783",
        formula="A_i = R_i - mean R in the group;  l = clipped surrogate;  sum over tokens / (rows * max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": GROUP | {"scale_by_std": False},
            "objective": CLIP | {"over": "constant"},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="8 samples per prompt, lr 1e-6, batch 128, no KL",
        differs="None.",
    ),
    "dapo": Preset(
        title="DAPO",
        paper="Yu et al. 2025, https://arxiv.org/abs/2503.14476",
        formula="A_i as GRPO, groups without a difference drawn anew;  l = max(-A w, -A clip(w, 0.8, 1.28));  "
        "token mean",
        settings={
            "policy": NO_CRITIC,
            "rollout": {"redraws": 3},
            "credit": GROUP | {"truncated": "drop"},
            "objective": CLIP_HIGHER | {"over": "token"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="512 prompts of 16 samples, 16 optimiser steps each, lr 1e-6, L_max 20480, soft penalty over "
        "the last 4096",
        differs="Redrawing stops after 3 rounds; groups that are dull then still count in the average. A group is "
        "dull if its rewards are equal, and not only if all are right or wrong. Completions that were cut off "
        "teach nothing but stay in the statistics. The soft penalty of long answers is the reward `overlong`, to "
        "be named in `rewards`.",
    ),
    "gspo": Preset(
        title="GSPO",
        paper="Zheng et al. 2025, https://arxiv.org/abs/2507.18071",
        formula="A_i as GRPO;  s = (prod_t w_t)^(1/L);  l = max(-A s, -A clip(s, 1 - 3e-4, 1 + 4e-4));  mean over "
        "sequences",
        settings={
            "policy": NO_CRITIC,
            "credit": GROUP,
            "objective": CLIP | {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "over": "sequence"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="clip 3e-4 / 4e-4, 4 minibatches per rollout, no KL",
        differs="None.",
    ),
    "gspo_token": Preset(
        title="GSPO-token",
        paper="Zheng et al. 2025, https://arxiv.org/abs/2507.18071, sec. 4.3",
        formula="as GSPO with s_t = sg(s) pi(y_t) / sg(pi(y_t));  A_t of each token: reward-to-go against the "
        "other rows",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "leave_one_out_process", "gamma": 1.0, "normalize": "scale"},
            "objective": CLIP | {"level": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4, "over": "sequence"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="the paper runs it with one advantage per sequence, where it equals GSPO",
        differs="Advantages differ from token to token, which is what this form is for.",
    ),
    "cispo": Preset(
        title="CISPO",
        paper="Chen et al. 2025 (MiniMax-M1), https://arxiv.org/abs/2506.13585",
        formula="A_i as GRPO;  l = -sg(min(w, 1 + eps_high)) A log pi(y_t);  token mean",
        settings={
            "policy": NO_CRITIC,
            "credit": GROUP,
            "objective": CLIP | {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "over": "token"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="no lower bound; eps_high is tuned and not stated",
        differs="Weights are cut at 5 (clip_high 4). verl, slime and NeMo-RL cut at 1.28 and 0.8; TRL takes the "
        "bare number for the bound.",
    ),
    "dppo": Preset(
        title="DPPO, bounded by probability and not by ratio",
        paper="Qi et al. 2026, https://arxiv.org/abs/2602.04879",
        formula="A_i = R_i - mean R in the group;  l = -sg(min(w, 20)) A log pi(y_t), 0 where pi - pi_old > 0.15 (A > "
        "0) or < -0.15;  sum over tokens / (rows * max_new_tokens)",
        settings={
            "policy": NO_CRITIC,
            "credit": GROUP | {"scale_by_std": False},
            "objective": CLIP | {"surrogate": "dppo", "clip_low": 0.15, "clip_high": 0.15, "over": "constant"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 8},
        },
        published="in verl's recipe: bounds of 0.15, 16 samples per prompt, 256 prompts in 8 minibatches, lr 1e-6",
        differs="The bound is about the trainer's own score of the rollout; the paper recommends the sampler's. Of its "
        "measures the binary total variation alone, not the KL and not the top-k ones.",
    ),
    "ma_rlhf": Preset(
        title="MA-RLHF, macro actions",
        paper="Chai et al. 2024, https://arxiv.org/abs/2410.02743",
        formula="GAE over actions of 5 tokens (rewards summed, values averaged); the advantage goes to all 5;  "
        "loss as PPO",
        settings={
            "policy": {"value_head": {"coefficient": 0.1, "clip": 0.2}},
            "credit": {"type": "gae", "gamma": 1.0, "lam": 0.95, "macro_size": 5, "normalize": "whiten"},
            "objective": CLIP | {"over": "token"},
            "kl": {"place": "reward", "coefficient": 0.05},
            "update": {"epochs": 4, "minibatches": 1},
        },
        published="n-grams of 5 (also parse constituents and perplexity), gamma 1, lambda 0.95, KL 0.05",
        differs="Of its ways to cut a text, n-grams alone. Rewards of a macro action are summed as the paper has "
        "it; its code averages them. The critic learns the target of the macro action at each of its tokens.",
    ),
    "high_entropy": Preset(
        title="High-entropy tokens only (80/20)",
        paper="Wang et al. 2025, https://arxiv.org/abs/2506.01939",
        formula="as DAPO, with A_t = 0 for all but the fifth of the batch's tokens that have the highest entropy",
        settings={
            "policy": NO_CRITIC,
            "rollout": {"redraws": 3},
            "credit": GROUP | {"truncated": "drop", "entropy_share": 0.2},
            "objective": CLIP_HIGHER | {"over": "token"},
            "kl": NO_KL,
            "update": {"epochs": 1, "minibatches": 4},
        },
        published="as DAPO, top 20% by entropy; gains grow with the model, none at 8B",
        differs="The entropy is that at sampling, over the whole rollout; the paper takes it over each optimiser "
        "step. The average still counts all tokens, so the step is a fifth of the size.",
    ),
    "otb": Preset(
        title="Optimal token baseline",
        paper="Optimal token baseline, 2026, PMLR 306; as verl implements it",
        formula="A_t = G_t - sum_j W_jt G_jt / sum_j W_jt over the group, W_t = sum_{s<=t} (1 - pi(y_s));  l = "
        "-log pi(y_t) A_t",
        settings={
            "policy": NO_CRITIC,
            "credit": {"type": "optimal_token_baseline", "gamma": 1.0, "normalize": "none"},
            "objective": PLAIN | {"over": "constant"},
            "kl": NO_KL,
            "update": ONCE,
        },
        published="4 samples per prompt do what 32 did",
        differs="The squared norm of a token's score is 1 - 2 pi(y) + sum pi^2 in the paper; 1 - pi(y) has the "
        "same mean and needs no pass over the vocabulary.",
    ),
})  # fmt: skip
"""The table of methods, in the order of docs/algorithms.md."""

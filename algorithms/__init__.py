"""One file per algorithm: how rollouts and rewards become a loss on the policy."""

"""How good a student is: the papers' protocol, and what it leaves out. Pure measures, and one driver.

suites        what is asked                        evaluate      generates, scores, measures, tells
rouge, answers, diversity                          texts -> numbers
exposure_bias, calibration                         log-probs -> numbers
generate, likelihood                               models -> texts, log-probs; each in a process of its own
judge, harness                                     others' opinions: an LLM, lm-evaluation-harness
"""

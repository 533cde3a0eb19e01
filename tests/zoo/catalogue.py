"""The list of the zoo: which Pyro programs are tried, after what, and whether each is fitted or refused.

The list was fixed before the programs were written and tried. A program stands in the file of its group, in words of
our own; what it is held against (`truth`) is independent of the package: a closed form, an enumeration, dense
quadrature, another tool, two-sided bounds, or long runs by numpy alone. "runs" means that there is none: the program
must fit, score, and say what it has integrated.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One program of the zoo."""

    name: str
    after: str
    outcome: str
    """"fitted" or "refused"."""
    truth: str


def _entries(text: str) -> list[Entry]:
    rows = [line.split("|") for line in text.strip().splitlines()]
    return [Entry(*(cell.strip() for cell in row)) for row in rows]


PYRO = _entries("""
coin_parameter            | Pyro tutorial: SVI, part 1                        | fitted  | closed form
coin_beta                 | Pyro tutorial: SVI, part 1                        | fitted  | closed form
coin_loop_of_sites        | Pyro tutorial: SVI, part 1 (a site a flip)        | fitted  | closed form
scale_weight_measurement  | Pyro tutorial: introduction to inference          | fitted  | closed form
linear_regression         | Pyro tutorial: Bayesian regression, part 1        | fitted  | closed form
regression_interaction    | Pyro tutorial: Bayesian regression, part 2        | fitted  | quadrature
regression_pyro_module    | Pyro tutorial: modules                            | fitted  | closed form
logistic_regression       | Pyro example: covtype                             | fitted  | quadrature
mixture_of_priors         | Pyro tutorial: Gaussian mixture                   | fitted  | quadrature
mixture_of_parameters     | Pyro tutorial: Gaussian mixture                   | fitted  | enumeration
dirichlet_process_normal  | Pyro tutorial: Dirichlet process mixtures         | fitted  | quadrature
dirichlet_process_poisson | Pyro tutorial: Dirichlet process mixtures         | fitted  | runs
hmm_0_loop_of_sequences   | Pyro example: hmm, model 0                        | fitted  | enumeration
hmm_1_plate_of_sequences  | Pyro example: hmm, model 1                        | fitted  | enumeration
hmm_2_autoregressive      | Pyro example: hmm, model 2                        | fitted  | enumeration
hmm_3_two_chains          | Pyro example: hmm, model 3                        | fitted  | enumeration
hmm_4_product_of_chains   | Pyro example: hmm, model 4                        | fitted  | enumeration
hmm_5_network             | Pyro example: hmm, model 5                        | fitted  | enumeration
hmm_6_second_order        | Pyro example: hmm, model 6                        | fitted  | enumeration
hmm_7_discrete_hmm        | Pyro example: hmm, model 7                        | fitted  | enumeration
hmm_with_priors           | Pyro example: hmm, its priors kept                | fitted  | quadrature
capture_recapture_1       | Pyro example: capture-recapture, model 1          | fitted  | enumeration
capture_recapture_2       | Pyro example: capture-recapture, model 2          | fitted  | enumeration
capture_recapture_3       | Pyro example: capture-recapture, random effects   | fitted  | quadrature
capture_recapture_5       | Pyro example: capture-recapture, by sex           | fitted  | enumeration
eight_schools_centered    | Pyro example: eight schools                       | fitted  | quadrature
eight_schools_noncentered | Pyro example: eight schools                       | fitted  | quadrature
eight_schools_reparam     | Pyro tutorial: reparameterisation (LocScaleReparam)| fitted | quadrature
eight_schools_rows        | Pyro example: eight schools, effects in the plate | fitted  | quadrature
baseball_fully_pooled     | Pyro example: baseball                            | fitted  | closed form
baseball_not_pooled       | Pyro example: baseball                            | fitted  | closed form
baseball_partially_pooled | Pyro example: baseball                            | fitted  | quadrature
baseball_logit            | Pyro example: baseball                            | fitted  | quadrature
forecast_local_level      | Pyro tutorial: forecasting I                      | fitted  | closed form
forecast_seasonal         | Pyro tutorial: forecasting II                     | fitted  | closed form
forecast_student_noise    | Pyro tutorial: forecasting I, heavy tails         | fitted  | runs
kalman_tracking           | Pyro tutorial: tracking in one dimension          | fitted  | closed form
vae                       | Pyro tutorial: variational autoencoder            | fitted  | two-sided bounds
ss_vae_labels             | Pyro tutorial: semi-supervised, some labels seen  | fitted  | enumeration
lda                       | Pyro example: latent Dirichlet allocation         | fitted  | quadrature
gaussian_process          | Pyro tutorial: Gaussian processes                 | fitted  | closed form
gplvm_linear              | Pyro tutorial: GPLVM, linear kernel               | fitted  | closed form
deep_exponential_family   | Pyro example: sparse gamma                        | fitted  | long runs
bayesian_network_rain     | Pyro example: enumeration, sprinkler              | fitted  | enumeration
inclined_plane            | Pyro example: inclined plane                      | fitted  | quadrature
bayesian_neural_network   | Pyro tutorial: tiny Bayesian network              | fitted  | runs
item_response_1           | Pyro users: item response, one parameter          | fitted  | quadrature
item_response_2           | Pyro users: item response, two parameters         | fitted  | quadrature
normalizing_flow          | Pyro tutorial: normalizing flows                  | fitted  | closed form
sir_with_poisson          | Pyro tutorial: epidemics, infinite counts         | refused | message
""")

STAN_AND_BUGS = _entries("""
stan_bernoulli            | Stan: bernoulli                                   | fitted  | closed form
stan_kidiq                | Stan: kid scores on mother's IQ                   | fitted  | closed form
stan_mesquite_log         | Stan: mesquite on the log scale                   | fitted  | closed form
stan_radon_pooled         | Stan: radon, complete pooling                     | fitted  | closed form
stan_radon_unpooled       | Stan: radon, no pooling                           | fitted  | closed form
stan_radon_groups         | Stan: radon, partial pooling, theta[group]        | fitted  | quadrature
stan_wells                | Stan: wells, logistic                             | fitted  | quadrature
stan_nes_logit            | Stan: votes, logistic                             | fitted  | quadrature
stan_glmm_poisson         | Stan: counts with effects of years                | fitted  | quadrature
stan_arma11               | Stan: arma(1, 1)                                  | fitted  | closed form
stan_ar2                  | Stan: arK                                         | fitted  | closed form
stan_garch11              | Stan: garch(1, 1)                                 | fitted  | closed form
stan_arch1                | Stan: arch(1)                                     | fitted  | closed form
stan_stochastic_volatility| Stan: stochastic volatility                       | fitted  | runs
stan_gp_regression        | Stan: gp_regr                                     | fitted  | closed form
stan_gp_poisson           | Stan: gp_pois_regr                                | fitted  | two-sided bounds
stan_two_normals          | Stan: low_dim_gauss_mix                           | fitted  | quadrature
stan_two_normals_collapse | Stan: low_dim_gauss_mix_collapse, without order   | fitted  | quadrature
stan_hmm_example          | Stan: hmm_example                                 | fitted  | enumeration
stan_irt_2pl              | Stan: irt_2pl                                     | fitted  | two-sided bounds
stan_dogs                 | Stan: dogs                                        | fitted  | quadrature
stan_dogs_log             | Stan: dogs_log                                    | fitted  | quadrature
stan_capture_m0           | Stan: M0                                          | fitted  | quadrature
stan_capture_mb           | Stan: Mb, behaviour                               | fitted  | quadrature
stan_censored             | Stan guide: censored data by a factor             | fitted  | closed form
stan_truncated            | Stan guide: truncated data                        | fitted  | closed form
stan_rounding             | Stan guide: rounded data by a factor              | fitted  | closed form
stan_zero_inflated        | Stan guide: zero-inflated counts                  | fitted  | closed form
stan_ordered_logistic     | Stan guide: ordered logistic                      | fitted  | closed form
stan_change_point         | Stan guide: change point of coal mining disasters | fitted  | enumeration
stan_measurement_error    | Stan guide: errors in covariates                  | fitted  | closed form
stan_meta_analysis        | Stan guide: meta-analysis                         | fitted  | quadrature
stan_robust_student       | Stan guide: robust regression                     | fitted  | quadrature
stan_lotka_volterra       | Stan: Lotka-Volterra by a fixed solver            | fitted  | runs
stan_funnel               | Stan guide: Neal's funnel with data               | fitted  | quadrature
bugs_rats                 | BUGS: rats                                        | fitted  | quadrature
bugs_pumps                | BUGS: pumps                                       | fitted  | quadrature
bugs_seeds                | BUGS: seeds                                       | fitted  | two-sided bounds
bugs_surgical             | BUGS: surgical, institutional ranking             | fitted  | quadrature
bugs_salm                 | BUGS: salmonella                                  | fitted  | two-sided bounds
bugs_dyes                 | BUGS: dyes                                        | fitted  | quadrature
bugs_equiv                | BUGS: bioequivalence                              | fitted  | quadrature
bugs_stacks               | BUGS: stacks, Laplace errors                      | fitted  | runs
bugs_epil                 | BUGS: epilepsy                                    | fitted  | two-sided bounds
bugs_blocker              | BUGS: blocker                                     | fitted  | two-sided bounds
bugs_lsat                 | BUGS: LSAT                                        | fitted  | quadrature
bugs_mice                 | BUGS: mice, censored Weibull                      | fitted  | closed form
bugs_beetles              | BUGS: beetles, three links                        | fitted  | quadrature
bugs_dugongs              | BUGS: dugongs, nonlinear growth                   | fitted  | quadrature
bugs_eyes                 | BUGS: eyes, two components                        | fitted  | quadrature
bugs_hearts               | BUGS: hearts, mixture with a cured share          | fitted  | quadrature
bugs_asia                 | BUGS: Asia, a Bayes net                           | fitted  | enumeration
bugs_line                 | BUGS: line                                        | fitted  | closed form
bugs_jaws                 | BUGS: jaws, multivariate normal                   | fitted  | closed form
bugs_birats               | BUGS: bivariate rats                              | fitted  | quadrature
bugs_oxford               | BUGS: Oxford, random effects                      | fitted  | two-sided bounds
bugs_alligators           | BUGS: alligators, multinomial logistic            | fitted  | runs
bugs_cervix               | BUGS: cervix, exposure partly observed            | fitted  | enumeration
bugs_stagnant             | BUGS: stagnant, change point                      | fitted  | quadrature
bugs_magnesium            | BUGS: magnesium, meta-analysis                    | fitted  | quadrature
""")

FEATURES = _entries("""
observed_less_latent      | obs = x - f(z)                                    | fitted  | closed form
observed_less_row_latent  | obs = x - z of the row                            | fitted  | closed form
observed_less_parameter   | obs = x - pyro.param                              | fitted  | closed form
observed_scaled           | obs = (x - m) / s                                 | refused | message
observed_log              | obs = x.log()                                     | fitted  | closed form
observed_less_mean        | obs = x - x.mean(0)                               | refused | message
own_missing_mask          | mask = ~x.isnan(), nan_to_num                     | fitted  | closed form
mask_of_argument          | mask from an argument that is no token            | fitted  | closed form
mask_of_values            | mask = x > 0                                      | refused | message
delta_tokens              | a reparameterised observed site (Delta)           | fitted  | closed form
literal_plate             | pyro.plate("rows", 20)                            | fitted  | closed form
improper_prior            | ImproperUniform                                   | refused | message
plate_of_columns          | plates of rows and columns                        | fitted  | closed form
rows_last                 | rows plate at dim -1, columns at -2               | fitted  | closed form
nested_groups             | patients in hospitals, theta[group]               | fitted  | quadrature
crossed_effects           | two crossed effects by index                      | fitted  | closed form
scaled_plate              | poutine.scale                                     | fitted  | closed form
deterministic_sites       | pyro.deterministic                                | fitted  | closed form
float32_network           | a network in single precision                     | fitted  | closed form
pyro_sample_weights       | PyroModule, PyroSample                            | fitted  | closed form
data_in_a_closure         | data in a closure, no argument                    | refused | message
two_inputs                | model(x1, x2, y)                                  | fitted  | closed form
response_in_the_table     | response and covariates in one table              | fitted  | closed form
integer_column_as_index   | a column of codes as an index                     | fitted  | closed form
optional_argument         | model(x, y=None, flag=True), a return value       | fitted  | closed form
subsampled_plate          | plate(subsample_size), latents of the data set    | fitted  | closed form
factor_density            | pyro.factor with a row's own log-density          | fitted  | closed form
factor_penalty            | pyro.factor on latents alone                      | refused | message
branch_on_latent          | Python's if on a discrete latent's value          | refused | message
changing_sites            | a random number of sites                          | refused | message
transformed_tokens        | TransformedDistribution as likelihood             | fitted  | closed form
spline_flow               | a spline coupling as density                      | fitted  | two readings
mixture_same_family       | MixtureSameFamily as likelihood                   | fitted  | closed form
gaussian_hmm_site         | dist.GaussianHMM                                  | fitted  | closed form
von_mises                 | angles                                            | fitted  | closed form
compositional_dirichlet   | Dirichlet rows                                    | fitted  | closed form
multinomial_rows          | Multinomial rows                                  | fitted  | closed form
categorical_table         | Categorical tokens                                | fitted  | closed form
beta_binomial             | BetaBinomial                                      | fitted  | closed form
negative_binomial         | GammaPoisson                                      | fitted  | closed form
binomial_latent           | Binomial latent with a fixed total                | fitted  | enumeration
poisson_latent            | Poisson latent                                    | refused | message
vague_gammas              | Gamma(1e-4, 1e-4) on precisions                   | fitted  | closed form
half_cauchy               | HalfCauchy scales                                 | fitted  | quadrature
lkj_covariance            | LKJCholesky and scales                            | fitted  | quadrature
horseshoe                 | horseshoe prior, three weights                    | fitted  | two-sided bounds
spike_and_slab            | discrete inclusion times a normal weight          | fitted  | enumeration
exchangeable_means        | two exchangeable means                            | fitted  | quadrature
exchangeable_three        | three exchangeable means, overlapping             | fitted  | two-sided bounds
equal_groups              | two effects of equal groups (one mode)            | fitted  | quadrature
sign_symmetric_factor     | a factor with sampled loadings                    | fitted  | quadrature
sign_constrained_factor   | the same, loadings half-normal                    | fitted  | two readings
random_walk               | a Gaussian random walk of rates                   | fitted  | two-sided bounds
spatial_car               | a proper conditional autoregression of counts     | fitted  | two-sided bounds
sum_to_zero               | effects that add up to zero                       | fitted  | closed form
autoregression_backwards  | Normal(a * x.flip(-1), s): a cycle                | refused | message
autoregression_1          | AR(1) over a table of series                      | fitted  | closed form
markov_switching          | regimes, each with its own autoregression         | fitted  | enumeration
probit_groups             | probit with 30 groups, flat and by rows           | fitted  | quadrature
many_shared_latents       | 70 latents of the data set                        | fitted  | two-sided bounds
""")

CATALOGUE = [*PYRO, *STAN_AND_BUGS, *FEATURES]
